"""Convert a checkpoint between Megatron (of hrm_megatron.pretrain), transformers (hf) and HRM-Text (native), or to a
GGUF file for llama.cpp (gguf)."""
from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from hrm_megatron.program import listen, one_line

if __name__ == "__main__":
    listen()

from hrm_megatron.parallel.cpu import activate
from hrm_megatron.parallel.log_levels import be_quiet

be_quiet()
activate()

from hrm_megatron.convert.checkpoint import EMA, RAW  # noqa: E402
from hrm_megatron.convert.gguf_file import KINDS  # noqa: E402
from hrm_megatron.convert.gguf_names import GENERATIONS  # noqa: E402
from hrm_megatron.convert.run import FORMATS, SAVE_FORMATS, Conversion, convert  # noqa: E402


def parse_arguments(arguments: Sequence[str] | None) -> Conversion:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--load", type=Path, required=True, metavar="DIR", help="checkpoint folder to read")
    parser.add_argument("--load-format", choices=FORMATS, required=True)
    parser.add_argument("--save", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--save-format", choices=SAVE_FORMATS, required=True)
    parser.add_argument("--weights", choices=(EMA, RAW),
                        help="take these weights alone, without optimizer state (default: ema for hf and gguf; the "
                             "others get weights, EMA and optimizer state where the source has them)")
    parser.add_argument("--ckpt-step", type=int, metavar="N",
                        help="iteration (megatron) or epoch (native) to read (default: the latest)")
    parser.add_argument("--tokenizer-model", type=Path, metavar="PATH",
                        help="tokenizer folder or tokenizer.json to put beside the model (hf) or into it (gguf); "
                             "without it, the token ids in the model's configuration are those of HRM-Text's "
                             "tokenizers")
    parser.add_argument("--dtype", choices=[*KINDS], default="float32",
                        help="of the weights (hf, gguf; q8_0, blocks of 8 bits, is gguf's alone; default: "
                             "%(default)s)")
    parser.add_argument("--gguf-keys", choices=[*GENERATIONS],
                        help="generation of the keys of the recurrence (gguf): hrm_text.hrm.h_cycles of llama.cpp's "
                             "releases (nested, the default), or hrm_text.h_cycles of builds from before (flat)")
    parser.add_argument("--data-report", type=Path, metavar="FILE",
                        help="report of the dataset, PREFIX.report.md, to put into the model card (hf, gguf)")
    parser.add_argument("--evaluation", type=Path, metavar="FILE",
                        help="Markdown about how well the model does, to put into the model card (hf, gguf)")
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE",
                        help="largest file of weights (hf; default: %(default)s)")
    parser.add_argument("--no-verify-checkpoint", dest="verify_checkpoint", action="store_false",
                        help="take what can be read of a damaged checkpoint")
    parser.add_argument("--verify", action=argparse.BooleanOptionalAction,
                        help="load the output with the code that will load it and compare logits with the source's on "
                             "a few rows, which takes the memory of a model in fp32 (default: below 2 billion "
                             "parameters)")
    parser.add_argument("--allow-nonfinite", action="store_true",
                        help="write tensors that hold NaN or infinities, with a warning (default: refuse them)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output folder, all of it")
    return Conversion(**vars(parser.parse_args(arguments)))


def main(arguments: Sequence[str] | None = None) -> int:
    job = parse_arguments(arguments)
    return one_line(lambda: print(convert(job)))


if __name__ == "__main__":
    sys.exit(main())
