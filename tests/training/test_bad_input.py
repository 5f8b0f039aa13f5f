"""What a user gets wrong costs one line, and nothing that is on disk."""
import dataclasses
import fcntl
import pickle
import platform
import shlex
import shutil

import numpy as np
import pytest

from hrm_megatron.checkpoint.folders import TRACKER_FILE
from hrm_megatron.checkpoint.manifest import MANIFEST_FILE
from hrm_megatron.data.indexed_examples import IndexedExamplesWriter
from hrm_megatron.data.tokenizer import TextTokenizer
from hrm_megatron.training.save_lock import LOCK_FILE
from tests.stores import part_of, write_single
from tests.training.conftest import FULLBATCH, GOLDEN, written

TOKENIZER = GOLDEN / "tokenizer"
SIZES = ["--num-layers", 1, "--hidden-size", 32, "--num-attention-heads", 4, "--seq-length", 96, "--lr", 1e-3,
         "--train-iters", 3, "--eval-iters", 0, "--global-batch-size", 2]
SAMPLED = ["--sampled-data-path", FULLBATCH / "sampled"]


@pytest.fixture
def refused(launch, tmp_path):
    """Check that a run ends with one line that holds `parts`, writes nothing, and trains not a step."""
    def check(*arguments, parts, ranks=1, prelude=""):
        before = written(tmp_path)
        run = launch(*arguments, ranks=ranks, prelude=prelude)
        assert run.code == 2 and "Traceback" not in run.output, run.output
        assert len(run.errors) == 1 and all(part in run.errors[0] for part in parts), run.output
        assert "step " not in run.output.replace(run.errors[0], "")
        assert written(tmp_path) == before
    return check


@pytest.mark.parametrize("file, form", [("config.json", "hf"), ("all_config.yaml", "native")])
def test_an_export_is_neither_gone_on_from_nor_saved_into(refused, tmp_path, file, form):
    """Tools would take the folder for that model, whatever is saved there."""
    folder = tmp_path / "it's an export"
    folder.mkdir()
    (folder / file).touch()
    there = ["--save", folder]
    refused(*SIZES, *SAMPLED, *there, parts=[f"--save {folder}: holds a model of the format {form}"])
    refused(*SIZES, *SAMPLED, *there, "--load", folder, parts=[f"holds a model of the format {form}"])
    refused(*SIZES, *SAMPLED, "--load", folder, parts=[
        f"--load {folder}: a folder of the format {form}; convert it once", shlex.quote(str(folder))])


@pytest.mark.parametrize("flags, parts", [
    (["--tensor-model-parallel-size", 3], ["--tensor-model-parallel-size 3 does not divide the 4 attention heads",
                                           "choose one of 1, 2, 4"]),
    (["--tensor-model-parallel-size", 2], ["1 processes cannot be divided into model replicas of 2"]),
    (["--pipeline-model-parallel-size", 2], ["1 processes cannot be divided into model replicas of 2"]),
    (["--context-parallel-size", 2, "--seq-length", 98], ["--context-parallel-size 2 cuts a row into 4 pieces", "98"]),
    (["--use-torch-fsdp2", "--use-megatron-fsdp"], ["--use-torch-fsdp2 is incompatible with --use-megatron-fsdp"]),
    (["--use-torch-fsdp2", "--fp16"], ["--use-torch-fsdp2 is incompatible with --fp16: leave one of them out"]),
    (["--use-megatron-fsdp", "--check-weight-hash-across-dp-replicas-interval", 2],
     ["--use-megatron-fsdp is incompatible with --check-weight-hash-across-dp-replicas-interval (no two"]),
    (["--use-megatron-fsdp", "--data-parallel-sharding-strategy", "no_shard"],
     ["--use-megatron-fsdp is incompatible with --data-parallel-sharding-strategy no_shard"]),
    (["--use-megatron-fsdp", "--recompute-ticks", 2], ["--use-megatron-fsdp is incompatible with --recompute-ticks"]),
    (["--use-megatron-fsdp", "--skip-train"], ["is incompatible with --skip-train (what tools/conv"]),
    (["--load", "any", "--override-opt-param-scheduler", "--use-checkpoint-opt-param-scheduler"],
     ["is incompatible with --use-checkpoint-opt-param-scheduler: leave one of them out"]),
    (["--use-megatron-fsdp", "--recompute-granularity", "full", "--recompute-method", "uniform",
      "--recompute-num-layers", 1],
     ["--use-megatron-fsdp is incompatible with recomputation of whole layers or MLPs"]),
    (["--use-megatron-fsdp", "--recompute-granularity", "selective", "--recompute-modules", "mlp"],
     ["--use-megatron-fsdp is incompatible with recomputation of whole layers or MLPs"]),
    (["--transformer-impl", "transformer_engine"], ["--transformer-impl transformer_engine: ", "needs a CUDA device",
                                                    "--transformer-impl local works here"]),
    (["--fp8-format", "hybrid"], ["--fp8-format hybrid: Transformer Engine needs a CUDA device", "leave it out"]),
    (["--bp-max-steps", 9], ["bp_steps=9", "choose 2 to 8 by --bp-max-steps"]),
    (["--bp-max-steps", 1], ["bp_steps=1", "choose 2 to 8 by --bp-max-steps"]),
    (["--bp-min-steps", 1], ["bp_steps=1", "choose 2 to 8 by --bp-min-steps"]),
    (["--bp-min-steps", 4, "--bp-max-steps", 3], ["bp_min_steps=4, bp_max_steps=3"]),
    (["--bp-warmup-fraction", 1.5], ["bp_warmup_fraction=1.5 must lie between 0 and 1"]),
    (["--lr-warmup-iters", 4], ["warmup_steps=4", "--lr-warmup-iters"]),
    (["--lr-decay-style", "linear"], ["--lr-decay-style linear: only cosine is built", "give --min-lr the value of"]),
    (["--min-lr", 1], ["--min-lr 1.0 must lie between 0 and --lr 0.001"]),
    (["--hidden-size", 30], ["hidden_size=30 is not a multiple of num_attention_heads=4"]),
    (["--seq-length", 40], ["example", "takes 48 positions, more than a row of 40", "raise --seq-length"]),
    (["--global-batch-size", 3, "--micro-batch-size", 2],
     ["--global-batch-size 3: is no multiple of 2, which is --micro-batch-size 2 x 1 replicas; choose 2 or 4"]),
    (["--eval-global-batch-size", 3, "--eval-micro-batch-size", 4],
     ["--eval-global-batch-size 3: is no multiple of 4", "--eval-micro-batch-size 4 x 1 replicas; choose 4"]),
    (["--qk-layernorm"], ["--qk-layernorm: HRM-Text neither norms nor clips queries and keys; leave it out"]),
    (["--train-iter", 4], ["unrecognized arguments: --train-iter 4; did you mean --train-iters?"]),
    (["--data-path", "somewhere"], ["no training data, or two kinds of it"]),
    (["--load", "nowhere"], ["--load nowhere: no checkpoint there"]),
    (["--recompute-ticks", 6], ["--recompute-ticks 6 must lie between 0 and 5", "--bp-max-steps"]),
    (["--recompute-ticks", -1], ["--recompute-ticks -1 must lie between 0 and 5"]),
    (["--recompute-ticks", 2, "--recompute-granularity", "full", "--recompute-method", "uniform",
      "--recompute-num-layers", 1], ["--recompute-granularity full would run layers three times: choose one"]),
    (["--recompute-granularity", "selective", "--recompute-modules", "mlp", "layernorm"],
     ["--recompute-modules layernorm: saves nothing in this model; choose among core_attn, mlp"]),
    (["--recompute-activations", "--recompute-modules", "moe"], ["--recompute-modules moe: saves nothing"]),
    (["--cpu-offloading-num-layers", 1], ["--cpu-offloading-num-layers 1: Transformer Engine needs a CUDA device",
                                          "--recompute-ticks saves activations anywhere"]),
    (["--attention-kernel", "varlen"], ["--attention-kernel varlen: it ", "works here"]),  # in fp32 on any machine
    (["--attention-backend", "fused"], ["--attention-backend fused: chooses within --attention-kernel te, and this",
                                        "give that too, or leave it out"]),
    (["--pipeline-schedule", "two-phase"], ["--pipeline-schedule two-phase: has no effect without a pipeline"]),
    (["--pipeline-window", 3], ["--pipeline-window 3: has no effect without a pipeline"]),
    (["--decoder-last-pipeline-num-layers", 1], ["--decoder-last-pipeline-num-layers 1: has no effect without a pip"]),
    (["--load-newest-valid"], ["--load-newest-valid: there is no checkpoint to load; give --load"]),
    (["--no-verify-checkpoint"], ["--no-verify-checkpoint: there is no checkpoint to load"]),
    (["--load-newest-valid", "--no-verify-checkpoint"], ["is incompatible with --no-verify-checkpoint"]),
    (["--init-scheme", "fixed_normal", "--h-cycles", 0], ["h_cycles=0: must be at least 1"]),
])
def test_settings(refused, flags, parts):
    refused(*SIZES, *SAMPLED, *flags, parts=parts)


@pytest.mark.parametrize("flags, parts", [
    ([], ["--pipeline-model-parallel-size 2 leaves stages without one of the 1 layers", "choose at most 1"]),
    (["--num-layers", 2, "--global-batch-size", 1], ["1 micro-batches per step are fewer than the 2 pipeline stages",
                                                     "raise --global-batch-size to 2"]),
    (["--num-layers", 2, "--decoder-first-pipeline-num-layers", 3],
     ["--decoder-first-pipeline-num-layers 3: leaves -1 of 2 layers of each stack for the other 1 stages"]),
    (["--num-layers", 2, "--eval-iters", 1, "--eval-global-batch-size", 1],
     ["evaluations of 1 rows: 1 micro-batches on each replica are fewer than the 2 pipeline stages"]),
    (["--num-layers", 2, "--pipeline-window", 2, "--pipeline-schedule", "stock"],
     ["--pipeline-window 2: has no effect with --pipeline-schedule stock"]),
])
def test_a_pipeline_that_cannot_be(refused, flags, parts):
    refused(*SIZES, *SAMPLED, "--pipeline-model-parallel-size", 2, *flags, parts=parts, ranks=2)


def test_what_megatron_refuses_by_itself_is_one_line_too(refused):
    refused(*SIZES, *SAMPLED, "--tensor-model-parallel-size", 2, "--sequence-parallel", "--recompute-granularity",
            "full", "--recompute-method", "uniform", "--recompute-num-layers", 1, "--distribute-saved-activations",
            parts=["command line: distribute_saved_activations: True must be false when sequence parallel"], ranks=2)


@pytest.mark.parametrize("flags, ranks, parts", [
    (["--use-torch-fsdp2", "--pipeline-model-parallel-size", 2], 2,
     ["--use-torch-fsdp2 is incompatible with --pipeline-model-parallel-size"]),
    (["--use-torch-fsdp2", "--global-batch-size", 3], 3,
     ["--use-torch-fsdp2 cannot share the hidden size (32) among 3 ranks: choose one of 1, 2, 4, 8, 16, 32"]),
    (["--use-torch-fsdp2", "--hidden-size", 24, "--ffn-hidden-size", 48, "--global-batch-size", 3], 3,
     ["--use-torch-fsdp2 cannot share the FFN columns (96) among 3 ranks: choose one of 1, 2, 4, 6, 8"]),
])
def test_fsdp_that_cannot_be(refused, flags, ranks, parts):
    refused(*SIZES, *SAMPLED, *flags, parts=parts, ranks=ranks)


def test_samples_that_are_less_than_a_step(refused):
    at = SIZES.index("--train-iters")
    refused(*SIZES[:at], *SIZES[at + 2:], *SAMPLED, "--train-samples", 1,
            parts=["--train-samples 1: is less than one step of 2 rows (--global-batch-size); give at least 2"])


def test_a_size_that_nobody_gave_is_named(refused):
    refused("--num-layers", 2, "--hidden-size", 32, "--num-attention-heads", 4, *SAMPLED, "--seq-length", 96,
            "--train-iters", 3, parts=["--lr is not set"])


def test_a_sampled_folder_with_an_index_out_of_range(refused, tmp_path):
    folder = shutil.copytree(FULLBATCH / "sampled", tmp_path / "sampled")
    starts = np.load(folder / "epoch_1" / "resp_start.npy")
    starts[3] = 10**6
    np.save(folder / "epoch_1" / "resp_start.npy", starts)
    refused(*SIZES, "--sampled-data-path", folder, parts=[f"{folder}/epoch_1/resp_start.npy: row 3 with value 1000000"])


@pytest.mark.parametrize("prelude", ["", "from hrm_megatron.data import sampled; sampled.SCANNED_BYTES = 0"],
                         ids=["when opened", "in its row"])
def test_a_token_id_between_the_vocabulary_and_its_padding(refused, tmp_path, prelude):
    folder = shutil.copytree(FULLBATCH / "sampled", tmp_path / "sampled")
    np.save(folder / "tokens.npy", np.full_like(np.load(folder / "tokens.npy"), 255))
    refused(*SIZES, "--sampled-data-path", folder, prelude=prelude,
            parts=[f"{folder}/epoch_0, example ", "token 0 of its prefix has the id 255, but the vocabulary has 250"])


@pytest.fixture
def store(tmp_path):
    tokenizer = TextTokenizer(TOKENIZER)
    with IndexedExamplesWriter(tmp_path / "store", tokenizer) as writer:
        for i in range(9):
            writer.add(tokenizer.encode_prefix("direct", "q" * i + "?"), tokenizer.encode_response(str(i)))
    return tmp_path / "store"


def test_a_truncated_store(refused, store):
    path = part_of(store, "bin")
    path.write_bytes(path.read_bytes()[:20])
    refused(*SIZES, "--data-path", store, parts=[f"{path}: truncated: 20 bytes"])


@pytest.mark.parametrize("part, ranks", [("bin", 1), ("example_keys", 2)])  # the last file is not rank 0's
def test_a_damaged_store_is_refused_where_it_is_verified(refused, store, part, ranks):
    path = part_of(store, part)
    data = bytearray(path.read_bytes())
    data[30] ^= 1  # an id becomes another one of the vocabulary: nothing else can see that
    path.write_bytes(data)
    refused(*SIZES, "--data-path", store, "--verify-data", ranks=ranks,
            parts=[f"{path}: bytes 0 to ", "are not what was written"])


def test_data_without_checksums_is_not_verified(refused, tmp_path):
    refused(*SIZES, *SAMPLED, "--verify-data", parts=["--verify-data: ", "no checksums"])
    write_single(tmp_path / "old", [([6, 7], [11])] * 9)
    refused(*SIZES, "--data-path", tmp_path / "old", "--verify-data", parts=["old has no checksums", "run python"])


def test_a_store_of_another_tokenizer(refused, store, tmp_path):
    other = tmp_path / "tokenizer.json"
    other.write_text((TOKENIZER / "tokenizer.json").read_text() + "\n")
    refused(*SIZES, "--data-path", store, "--tokenizer-model", other,
            parts=[f"{store} was written with tokenizer", "give that tokenizer or run"])


@pytest.fixture
def saved(uninterrupted, tmp_path):
    return shutil.copytree(uninterrupted / "checkpoints", tmp_path / "checkpoints")


@pytest.mark.parametrize("flags, parts", [
    (["--num-layers", 3], ["iter_0000024: its model has num_layers=2, the command line makes 3"]),
    (["--ffn-hidden-size", 128], ["its model has ffn_hidden_size=256, the command line makes 128"]),
    (["--l-cycles", 2], ["its model has l_cycles=3, the command line makes 2"]),
    (["--norm-placement", "post"], ["its model has norm_placement=pre"]),
    (["--init-scheme", "fixed_normal"], ["its model has embedding_scale=5.65", "the command line makes 50.0"]),
    (["--verify-integrity", "--train-iters", 25, "--override-opt-param-scheduler"],
     ["--verify-integrity: ", "iter_0000024 was saved without it; leave it out"]),
    (["--ckpt-step", 7], ["iter_0000007: not there; choose another with --ckpt-step (complete: iter_0000012, iter_"]),
])
def test_a_checkpoint_that_does_not_fit(refused, fullbatch_arguments, saved, flags, parts):
    refused(*fullbatch_arguments, "--load", saved, *flags, parts=parts)


def test_a_checkpoint_with_nothing_complete(refused, fullbatch_arguments, saved):
    for folder in saved.glob("iter_*"):
        (folder / MANIFEST_FILE).unlink()  # else what is gone would be damage
        (folder / ".metadata").unlink()
    refused(*fullbatch_arguments, "--load", saved, "--save", saved,
            parts=["iter_0000024: half-written", "none is complete"])


def test_a_checkpoint_that_lost_a_shard(refused, fullbatch_arguments, saved):
    shards = sorted((saved / "iter_0000024").glob("*.distcp"), key=lambda path: path.stat().st_size)
    size = shards[-1].stat().st_size
    with shards[-1].open("r+b") as file:
        file.truncate(size - 9)
    refused(*fullbatch_arguments, "--load", saved, parts=[f"{shards[-1]}: {size - 9} bytes are there", "--ckpt-step"])
    shards[-1].unlink()
    refused(*fullbatch_arguments, "--load", saved, "--no-load-optim", parts=[f"{shards[-1]}: 0 bytes are there"])


def test_the_state_of_one_weight_is_never_silently_fresh(refused, fullbatch_arguments, saved):
    place = saved / "iter_0000024" / ".metadata"
    (place.parent / MANIFEST_FILE).unlink()
    metadata = pickle.loads(place.read_bytes())
    lost = "optimizer.state.ema.h_stack.layers.1.mlp.linear_fc2.weight"
    entry = metadata.state_dict_metadata[f"{lost}s"] = metadata.state_dict_metadata.pop(lost)
    metadata.storage_data = {dataclasses.replace(index, fqn=f"{lost}s") if index.fqn == lost else index: info
                             for index, info in metadata.storage_data.items()}
    place.write_bytes(pickle.dumps(metadata))
    refused(*fullbatch_arguments, "--load", saved, "--train-iters", 25,
            parts=[f"holds no ema of the optimizer for {lost[20:]}"])
    entry.chunks.pop()
    place.write_bytes(pickle.dumps(metadata))
    refused(*fullbatch_arguments, "--load", saved, parts=[f"{lost}s: its pieces are not the whole tensor of [32, 256]"])


def test_the_checkpoints_of_another_run_are_not_written_over(refused, fullbatch_arguments, saved, native_start):
    for load in ([], ["--load", native_start]):
        refused(*fullbatch_arguments, *load, "--save", saved,
                parts=[f"--save {saved}: holds iter_0000024 of another run", f"give --load {saved}"])


def test_a_checkpoint_without_an_average(launch, refused, fullbatch_arguments, tmp_path):
    folder = tmp_path / "checkpoints"
    flags = [*fullbatch_arguments, "--save", folder, "--save-interval", 2, "--exit-interval", 2]
    assert launch(*flags, "--no-save-optim").code == 0
    refused(*flags, "--load", folder, parts=["iter_0000002: holds no exp_avg of the optimizer for embedding.word_em",
                                            "--no-load-optim"])
    again = launch(*flags, "--load", folder, "--no-load-optim", "--exit-interval", 4)
    assert again.code == 0 and (folder / TRACKER_FILE).read_text() == "4"


def test_a_folder_that_another_run_saves_to(refused, tmp_path):
    path = tmp_path / LOCK_FILE
    with open(path, "w") as file:
        file.write(f"process 7 on {platform.node()} since noon")
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        refused(*SIZES, *SAMPLED, "--save", tmp_path, "--load", tmp_path,
                parts=[f"--save {tmp_path} is in use by another run (process 7 on {platform.node()} since noon); wait"])
    assert path.read_text().startswith("process 7 on")
