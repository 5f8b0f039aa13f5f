"""Megatron's flags for the shape of a transformer and for how its layers compute."""
from __future__ import annotations

from hrm_megatron.training.flags.reasons import (
    BY_GENERATE,
    BY_INIT_SCHEME,
    FIRST_AND_LAST,
    IN_BF16,
    NO_EXPERTS,
    ONLY_GENERATION,
    OTHER_LAYERS,
    OWN_CONTEXT,
    OWN_WEIGHTS,
    TICKS_ARE_CHUNKS,
    UNTESTED,
)
from hrm_megatron.training.flags.verdict import Group, Harmless, Refused, Used

NO_DROPOUT = "an HRM has no dropout, as HRM-Text"
ONE_SWIGLU = "the MLP of an HRM is SwiGLU, as in HRM-Text"
ONE_ATTENTION = "the attention of an HRM is PrefixLM over all earlier positions of an example"
PLAIN_ROTARY = "positions of an HRM are plain rotary ones over the whole head, restarting in every example"
ROTARY_BASE = "leave it out; --rotary-base sets their base"
NO_GRAPHS = ("not built: a graph repeats the sizes of one micro-batch, and those of attention follow the examples of "
             "each")
OTHER_RECIPES = "give --fp8-format with --fp8-recipe delayed, tensorwise or mxfp8"

TRANSFORMER: Group = (
    Used("hrm_megatron.training.arguments",
         "--num-layers --hidden-size --num-attention-heads --ffn-hidden-size --transformer-impl "
         "--tensor-model-parallel-size --pipeline-model-parallel-size --context-parallel-size"),
    Used("hrm_megatron.transformer_config", "--norm-epsilon"),
    Used("hrm_megatron.training.memory", "--cpu-offloading-num-layers"),
    Used("megatron.core.models.common.language_module.language_module", "--attention-backend",
         only=("auto", "flash", "fused", "unfused")),  # of Transformer Engine
    Used("megatron.core.models.common.embeddings.language_model_embedding", "--no-clone-scatter-output-in-embedding"),
    Used("megatron.core.tensor_parallel.layers", "--sequence-parallel --use-cpu-initialization"),
    Used("megatron.core.transformer.transformer_config", "--disable-bf16-reduced-precision-matmul"),
    Used("megatron.core.transformer.transformer_layer", "--mlp-chunks-for-training"),
    Used("megatron.training.arguments", "--deterministic-mode --fp16 --bf16"),
    Used("megatron.training.initialize", "--pipeline-model-parallel-comm-backend",
         needs="--pipeline-model-parallel-size", cuda=True),
    Used("megatron.core.pipeline_parallel.schedules", "--overlap-p2p-communication-warmup-flush",
         needs="--pipeline-model-parallel-size"),
    Used("megatron.core.transformer.transformer_block", "--recompute-granularity"),
    Used("hrm_megatron.training.memory", "--recompute-modules",
         needs="--recompute-granularity --recompute-activations"),
    Used("megatron.core.recompute", "--recompute-method --recompute-num-layers --distribute-saved-activations",
         needs="--recompute-granularity"),
    Used("megatron.core.transformer.transformer_block", "--fp8-format"),
    Used("megatron.core.fp8_utils", "--fp8-recipe --first-last-layers-bf16", needs="--fp8-format"),
    Used("megatron.core.extensions.transformer_engine", "--fp8-margin --fp8-amax-history-len --fp8-amax-compute-algo",
         needs="--fp8-format, --fp8-recipe=delayed"),
    Used("megatron.core.fp8_utils", "--num-layers-at-start-in-bf16 --num-layers-at-end-in-bf16",
         needs="--first-last-layers-bf16"),
    Harmless("an HRM has gated attention", "--attention-output-gate"),
    Harmless("an HRM has no biases", "--disable-bias-linear"),
    Harmless("every loss of an HRM is per token", "--calculate-per-token-loss"),
    Harmless("the head of an HRM fuses logits and loss in chunks", "--cross-entropy-loss-fusion"),
    Harmless(OWN_WEIGHTS, "--no-initialization"),
    Refused("norms of an HRM are RMSNorm without weights", "--normalization --apply-layernorm-1p"),
    Refused("norms of an HRM stand where --norm-placement says", "--apply-residual-connection-post-layernorm",
            "give --norm-placement post"),
    Refused("norms of an HRM are our own", "--fused-residual-rmsnorm"),
    Refused("recipes of Transformer Engine no longer have this choice, and drop it", "--no-fp8-wgrad"),
    Refused(NO_DROPOUT, "--hidden-dropout --attention-dropout"),
    Refused("an HRM has no biases", "--add-qkv-bias"),
    Refused("HRM-Text neither norms nor clips queries and keys", "--qk-layernorm --qk-l2-norm --qk-clip "
            "--qk-clip-alpha --qk-clip-threshold"),
    Refused("every query head of an HRM has its own keys and values", "--num-query-groups"),
    Refused("a head of an HRM is hidden size / attention heads wide", "--kv-channels",
            "leave it out; --num-attention-heads sets the width"),
    Refused(ONE_SWIGLU, "--glu-linear-offset --activation-func-clamp-value --use-fused-weighted-squared-relu "
            "--use-transformer-engine-op-fuser --use-grouped-gemm-for-dense-mlp"),
    Refused("which activation kernel runs is decided by the machine and --recompute-modules gated_act",
            "--use-te-activation-func"),
    Refused(ONE_ATTENTION, "--softmax-type --apply-query-key-layer-scaling --multi-latent-attention "
            "--experimental-attention-variant"),
    Refused("it pins a kernel of Megatron's inference", "--flash-attention-version", "choose by --attention-kernel"),
    Refused("its kernels have no PrefixLM attention", "--batch-invariant-mode", "give --deterministic-mode"),
    Refused("its kernels have no PrefixLM attention", "--use-kitchen-attention --kitchen-attention-backend",
            "choose by --attention-kernel"),
    Refused(PLAIN_ROTARY, "--rotary-interleaved --mrope-section", ROTARY_BASE),
    Refused("states of an HRM have the dtype of its weights", "--fp32-residual-connection"),
    Refused(OWN_WEIGHTS, "--init-method-std --embedding-init-method-std --init-model-with-meta-device",
            BY_INIT_SCHEME),
    Refused("HRM-Text has no such parametrization", "--use-mup --mup-width-mult --mup-base-hidden-size "
            "--mup-embedding-mult --mup-output-mult --mup-base-head-dim --mup-attn-scale-power"),
    Refused("an HRM predicts one token", "--mtp-standalone --mtp-num-layers --mtp-loss-scaling-factor "
            "--mtp-use-repeated-layer --mtp-detach-heads --mtp-hybrid-override-pattern"),
    Refused(OTHER_LAYERS, "--dsa-indexer-n-heads --dsa-indexer-head-dim --dsa-indexer-topk --dsa-indexer-topk-freq "
            "--dsa-indexer-skip-topk-offset --dsa-indexer-loss-coeff --dsa-indexer-use-sparse-loss "
            "--dsa-kernel-backend --dsa-indexer-rope-interleaved --no-dsa-indexer-rotate-activation "
            "--no-dsa-indexer-scoring-relu --dsa-indexer-k-norm-epsilon --dsa-indexer-k-norm-fp32 "
            "--linear-conv-kernel-dim --linear-key-head-dim --linear-value-head-dim --linear-num-key-heads "
            "--linear-num-value-heads --is-hybrid-model --mamba-state-dim --mamba-head-dim --mamba-num-groups "
            "--mamba-num-heads --disable-mamba-mem-eff-path"),
    Refused("the head's loss is our own", "--cross-entropy-fusion-impl"),
    Refused(IN_BF16,
            "--fp4-format --fp4-recipe --fp4-quantizer-factory --fp8-output-proj"),
    Refused("no recipe for it is built", "--fp8-quantizer-factory", OTHER_RECIPES),
    Refused("Transformer Engine ignores it since 1.8", "--fp8-interval"),
    Refused(NO_GRAPHS, "--enable-cuda-graph --external-cuda-graph --cuda-graph-impl --cuda-graph-warmup-steps "
            "--delay-offload-until-cuda-graph", "leave it out (--compile-layers saves launches too)"),
    Refused("not built for this model", "--fine-grained-activation-offloading --offload-modules "
            "--min-offloaded-tensor-size --delta-offload-bytes-across-pp-ranks --activation-offload-fraction "
            "--fine-grained-offloading-max-inflight-offloads",
            "leave it out: --cpu-offloading-num-layers moves whole layers' activations"),
    Refused("our offloading has buffers of its own", "--cpu-offloading-retain-pinned-cpu-buffers"),
    Refused("Megatron fails to write an HRM's configuration", "--config-logger-dir",
            "leave it out: the start of a run prints all settings"),
    Refused(OWN_CONTEXT, "--hierarchical-context-parallel-sizes --max-seqlen-per-dp-cp-rank "
            "--hybrid-context-parallel"),
    Refused(UNTESTED, "--tp-comm-overlap --no-tp-comm-bulk-wgrad --no-tp-comm-bulk-dgrad --no-tp-comm-overlap-ag "
            "--no-tp-comm-overlap-rs --tp-comm-overlap-rs-dgrad --no-tp-comm-split-ag --no-tp-comm-split-rs "
            "--tp-comm-bootstrap-backend --delay-wgrad-compute --tensor-parallel-num-weight-shards "
            "--symmetric-ar-type"),
    Refused("it needs a torch that nobody publishes", "--use-ring-exchange-p2p"),
    Refused("the head's backward pass is our own and has nothing to defer",
            "--defer-embedding-wgrad-compute --wgrad-deferral-limit"),
    Refused(f"{TICKS_ARE_CHUNKS}, in groups of as many micro-batches as stages",
            "--microbatch-group-size-per-virtual-pipeline-stage"),
    Refused("layers are shared out so that all stages are equally fast, head included",
            "--account-for-embedding-in-pipeline-split --account-for-loss-in-pipeline-split",
            FIRST_AND_LAST),
    Refused(ONLY_GENERATION, "--inference-cuda-graph-scope --flash-decode --nccl-all-reduce-for-prefill "
            "--inference-fuse-tp-communication --inference-disable-triton-nvls-kernels "
            "--inference-grouped-gemm-backend --inference-moe-disable-fused-quant-kernels "
            "--inference-moe-token-dispatcher-type --mlp-chunks-for-prefill",
            BY_GENERATE),
    Refused(NO_EXPERTS, "--expert-model-parallel-size --expert-tensor-parallel-size "
            "--expert-tensor-parallel-num-weight-shards --overlap-moe-expert-parallel-comm "
            "--overlap-dispatch-backward-with-experts-wgrad --ep-overlap-early-attn-memory-release "
            "--high-priority-a2a-comm-stream --use-grouped-gemm-for-shared-expert "
            "--moe-shared-expert-intermediate-size --moe-shared-expert-gate --moe-shared-expert-overlap "
            "--moe-shared-expert-glu-interleave-size --moe-ffn-hidden-size --moe-router-topk "
            "--moe-enable-routing-replay --moe-router-padding-for-quantization --moe-router-padding-for-fp8 "
            "--moe-router-num-groups --moe-router-group-topk --moe-router-pre-softmax "
            "--moe-router-topk-scaling-factor --moe-router-score-function --moe-router-dtype "
            "--moe-router-enable-expert-bias --moe-router-bias-update-rate --moe-router-quantile-balancing-ema "
            "--moe-router-force-load-balancing --moe-router-force-biased --moe-grouped-gemm "
            "--moe-single-grouped-weight --moe-single-grouped-bias --moe-z-loss-coeff --moe-input-jitter-eps "
            "--moe-token-dispatcher-type --moe-enable-deepep --moe-flex-dispatcher-backend "
            "--moe-permute-fusion-into-hybridep --moe-hybridep-pad-uneven-dispatch-inputs --moe-per-layer-logging "
            "--moe-expert-capacity-factor --moe-pad-expert-input-to-capacity "
            "--moe-pad-experts-for-cuda-graph-inference --moe-token-drop-policy --moe-layer-recompute "
            "--moe-permute-fusion --moe-router-fusion --moe-apply-probs-on-input --moe-latent-size "
            "--moe-flex-dispatcher-num-sms --moe-deepep-num-sms --moe-hybridep-num-sms "
            "--moe-hybridep-num-blocks-permute --moe-hybridep-num-blocks-unpermute "
            "--moe-hybridep-num-sms-preprocessing --moe-ncclep-static-shape --moe-ncclep-zero-copy "
            "--moe-mlp-glu-interleave-size --moe-expert-rank-capacity-factor --moe-paged-stash "
            "--moe-paged-stash-page-size --moe-paged-stash-buffer-size-factor-cuda "
            "--moe-paged-stash-buffer-size-factor-cpu"),
)
NETWORK: Group = (
    Used("hrm_megatron.transformer_config", "--rotary-base"),
    Harmless("positions of an HRM need no table; a row has --seq-length of them", "--max-position-embeddings"),
    Harmless("positions of an HRM are rotary", "--use-rotary-position-embeddings --no-position-embedding"),
    Harmless(ONE_SWIGLU, "--swiglu"),
    Harmless("embedding and head of an HRM are two matrices", "--untie-embeddings-and-output-weights"),
    Refused("both stacks of an HRM have --num-layers", "--encoder-num-layers --decoder-num-layers",
            "give --num-layers, which counts layers of each stack"),
    Refused("every query head of an HRM has its own keys and values", "--group-query-attention"),
    Refused(ONE_ATTENTION, "--window-size --window-attn-skip-freq"),
    Refused(PLAIN_ROTARY, "--position-embedding-type --yarn-original-max-position-embeddings --yarn-beta-fast "
            "--yarn-beta-slow --yarn-correction-range-round-to-int --no-yarn-correction-range-round-to-int "
            "--relative-attention-num-buckets --relative-attention-max-distance --rotary-percent "
            "--rotary-seq-len-interpolation-factor --use-rope-scaling --rope-scaling-factor --no-rope-freq",
            ROTARY_BASE),
    Refused("HRM-Text pads the vocabulary to a multiple of 256", "--make-vocab-size-divisible-by"),
    Refused(ONE_SWIGLU, "--openai-gelu --squared-relu --quick-geglu"),
    Refused("no part of this version reads it", "--onnx-safe --bert-no-binary-head"),
)
