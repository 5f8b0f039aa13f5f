"""Megatron's flags for other models and other programs, none of which an HRM uses."""
from __future__ import annotations

from hrm_megatron.training.flags.reasons import BY_GENERATE, NO_EXPERTS, ONLY_GENERATION, OTHER_LAYERS
from hrm_megatron.training.flags.verdict import Group, Refused

OTHER_MODEL = "it belongs to another model of Megatron's"
NO_RL = "reinforcement learning of an HRM is not built"
EXAMPLES = "rows of an HRM are examples of instruction and response already"

RL: Group = (
    Refused(NO_RL, "--perform-rl-step --rl-prompts-per-eval --grpo-prompts-per-step --grpo-group-size "
            "--rl-generation-lag --rl-submission-granularity --rl-consumption-granularity --grpo-iterations "
            "--grpo-clamp-eps-lower --grpo-clamp-eps-upper --grpo-kl-beta --grpo-entropy-term-weight "
            "--grpo-filter-groups-with-same-reward --langrl-env-config --rl-default-temperature --rl-default-top-p "
            "--rl-default-top-k --rl-offload-optimizer-during-inference --rl-kv-cache-management-mode "
            "--rl-persist-cuda-graphs --rl-partial-rollouts --rl-inference-logprobs-is-correction "
            "--rl-importance-sampling-truncation-coef --rl-use-sequence-packing "
            "--rl-sequence-packing-max-sequences-per-bin --rl-sequence-packing-algo --rl-training-cuda-graphs "
            "--rl-inference-tensor-model-parallel-size --rl-inference-pipeline-model-parallel-size "
            "--rl-inference-expert-model-parallel-size --rl-inference-expert-tensor-model-parallel-size "
            "--rl-inference-model-unified-memory-level --rl-offload-inference-model-weights-when-idle "
            "--refit-method --rl-verify-model-weights-swap --rl-skip-bos-token --rl-profile --rl-profile-dir "
            "--rl-inference-parsers"),
)
BIENCODER: Group = (
    Refused(OTHER_MODEL, "--ict-head-size --biencoder-projection-dim --biencoder-shared-query-context-model "
            "--ict-load --bert-load --titles-data-path --query-in-block-prob --use-one-sent-docs "
            "--evidence-data-path --retriever-report-topk-accuracies --retriever-score-scaling --block-data-path "
            "--embedding-path --indexer-batch-size --indexer-log-interval"),
)
VISION: Group = (
    Refused(OTHER_MODEL, "--num-classes --img-h --img-w --num-channels --patch-dim --classes-fraction "
            "--data-per-class-fraction --no-data-sharding --head-lr-mult --vision-pretraining "
            "--vision-pretraining-type --vision-backbone-type --swin-backbone-type --mask-type --mask-factor "
            "--iter-per-epoch --dino-local-img-size --dino-local-crops-number --dino-head-hidden-size "
            "--dino-bottleneck-size --dino-freeze-last-layer --dino-norm-last-layer --dino-warmup-teacher-temp "
            "--dino-teacher-temp --dino-warmup-teacher-temp-epochs"),
)
MOE: Group = (
    Refused(NO_EXPERTS, "--num-experts --moe-layer-freq --moe-use-upcycling --moe-router-load-balancing-type "
            "--moe-aux-loss-coeff --moe-upcycling-granularity"),
)
MLA: Group = (
    Refused(OTHER_LAYERS, "--q-lora-rank --kv-lora-rank --qk-head-dim --qk-pos-emb-head-dim --v-head-dim "
            "--rotary-scaling-factor --mscale --mscale-all-dim --cache-mla-latents --mla-down-proj-fusion"),
)
ATTENTION_VARIANT: Group = (Refused(OTHER_LAYERS, "--linear-attention-freq"),)
HETEROGENEOUS: Group = (
    Refused("all layers of an HRM are alike", "--heterogeneous-layers-config-path "
            "--heterogeneous-layers-config-encoded-json"),
)
INFERENCE: Group = (
    Refused("CUDA graphs are not built", "--cuda-graph-scope --cuda-graph-modules"),
    Refused(ONLY_GENERATION, "--inference-batch-times-seqlen-threshold --max-tokens-to-oom --output-bert-embeddings "
            "--bert-embedder-type --use-legacy-static-engine --inference-max-requests --inference-max-seq-length "
            "--inference-dynamic-batching --inference-dynamic-batching-buffer-size-gb "
            "--inference-dynamic-batching-paused-buffer-size-gb --inference-dynamic-batching-mamba-memory-ratio "
            "--inference-dynamic-batching-block-size --inference-dynamic-batching-max-requests "
            "--inference-dynamic-batching-max-tokens --inference-dynamic-batching-num-cuda-graphs "
            "--inference-dynamic-batching-track-paused-request-events "
            "--inference-dynamic-batching-track-generated-token-events --decode-only-cuda-graphs "
            "--inference-cuda-graph-all-prefills --inference-cuda-graph-max-tokens "
            "--inference-dynamic-batching-unified-memory-level --enable-chunked-prefill --num-speculative-tokens "
            "--inference-dynamic-batching-prefix-caching "
            "--inference-dynamic-batching-prefix-caching-eviction-policy "
            "--inference-dynamic-batching-prefix-caching-coordinator-policy "
            "--inference-dynamic-batching-prefix-caching-routing-alpha "
            "--inference-dynamic-batching-prefix-caching-mamba-gb "
            "--inference-dynamic-batching-cuda-graph-mixed-prefill-count "
            "--inference-dynamic-batching-cuda-graph-sizing-distribution "
            "--inference-dynamic-batching-sampling-backend --use-same-sampling-seed-across-dp-ranks "
            "--inference-dynamic-batching-async-sched-mode --inference-dynamic-batching-logprobs-mode "
            "--inference-logging-step-interval --inference-text-gen-server-logging --inference-wandb-logging "
            "--inference-coordinator-port --mamba-inference-conv-states-dtype --mamba-inference-ssm-states-dtype "
            "--inference-use-synchronous-zmq-collectives --inference-disable-ep-consensus --inference-shards",
            BY_GENERATE),
)
SFT: Group = (
    Refused(EXAMPLES, "--sft --sft-tokenizer-prompt-format",
            "leave it out: losses are of responses only; --load or --finetune goes on from a model"),
)
