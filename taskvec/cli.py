"""The command line: `taskvec merge`, `taskvec methods`, `taskvec inspect`.

Only arguments are parsed here; the work is in `taskvec.commands`. What a user can put right ends in one line on
standard error and exit code 2.
"""

import argparse
import dataclasses
import pathlib
import sys
from collections.abc import Sequence

_MERGE = """
  taskvec merge --method ties --set density=0.2 --base BASE --expert A --expert B --out OUT
  taskvec merge recipe.yml --out OUT                  a recipe in MergeKit's grammar
  taskvec merge OUT/taskvec_merge.json --out OUT2     the same merge again

A model is a Hugging Face folder (safetensors, or else pytorch_model.bin), a file with weights, an orbax checkpoint, a
PEFT LoRA adapter, MODEL+ADAPTER, or a hub id, OWNER/NAME or OWNER/NAME/FOLDER. `taskvec methods` lists the methods.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code."""
    args = _parser().parse_args(argv)
    try:
        args.run(args)
    except (ValueError, OSError, KeyError) as error:
        if args.debug:
            raise
        text = error.args[0] if isinstance(error, KeyError) and error.args else str(error)
        print(f"taskvec {args.command}: {' '.join(str(text).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"taskvec {args.command}: interrupted", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="taskvec", description="Task vectors and model merging.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show where an error came from")
    _add_merge(commands, common)
    methods = commands.add_parser("methods", parents=[common], help="the methods there are, or one in full")
    methods.add_argument("name", nargs="?", metavar="NAME")
    methods.set_defaults(run=_methods)
    inspect = commands.add_parser("inspect", parents=[common], help="norms, cosines, sign conflict, what differs")
    inspect.add_argument("base", metavar="BASE")
    inspect.add_argument("experts", nargs="+", metavar="MODEL")
    inspect.add_argument("--include", default="", metavar="REGEX", help="only tensors whose name matches")
    inspect.add_argument("--density", type=float, default=1.0, help="signs of the largest entries only (default: all)")
    inspect.add_argument("--plot", default="", metavar="FILE.png", help="draw a figure")
    inspect.set_defaults(run=_inspect)
    return parser


def _add_merge(commands, common: argparse.ArgumentParser) -> None:
    merge = commands.add_parser(
        "merge",
        parents=[common],
        help="merge checkpoints on disk",
        description="Merges fine-tuned copies of a model into one, in bounded memory.",
        epilog=_MERGE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = merge.add_argument
    add("recipe", nargs="?", metavar="RECIPE", help="a MergeKit recipe (YAML), or a taskvec_merge.json to repeat")
    add("--method", default="", metavar="NAME", help="see `taskvec methods`")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the method; repeat for more")
    add("--base", default="", metavar="MODEL", help="the pretrained model")
    add("--expert", action="append", default=[], metavar="[LABEL=]MODEL", help="a fine-tuned model; repeat for more")
    add("--extra", action="append", default=[], metavar="NAME=MODEL", help="what a method needs besides, per expert")
    add("--out", metavar="OUT", help="folder to write (or a file ending in .safetensors)")
    add("--include", default="", metavar="REGEX", help="merge tensors whose name matches, copy the rest from the base")
    add("--task", default="", metavar="EXPERT", help="whose model to write, for methods that give one model per expert")
    add("--dtype", default="", metavar="DTYPE", help="float32, bfloat16 or float16 (default: the base's)")
    add("--lora", default="delta", choices=("delta", "factor"), help="merge adapters as products B A, or their factors")
    add("--memory", default="", metavar="SIZE", help="for the blocks in flight (default: 1GB, or what a record had)")
    add("--shard-size", default="5GB", metavar="SIZE", help="the most in one file (default: 5GB)")
    add("--dry-run", action="store_true", help="check everything, print the plan, stop")
    add("--no-hash", action="store_true", help="record sizes of the inputs, not their SHA-256")
    add("--overwrite", action="store_true", help="delete the model that OUT holds first")
    merge.set_defaults(run=_merge)


def _merge(args: argparse.Namespace) -> None:
    # Before the imports, which keep one core busy for a second.
    from taskvec.io.hashes import Hashes, weights_of

    hashing = None if args.no_hash or args.dry_run else Hashes(weights_of(_names(args)))
    from taskvec import host
    from taskvec.commands import request

    host.keep_programs()
    earlier = None
    if args.recipe and args.recipe.endswith(".json"):
        given = [
            n for n in ("method", "base", "expert", "set", "include", "task", "dtype", "extra") if getattr(args, n)
        ]
        if given:
            raise ValueError(f"a record is repeated as it is: leave out --{given[0]}")
        wanted, earlier = request.from_record(pathlib.Path(args.recipe))
    else:
        wanted = request.Request(
            method=args.method,
            settings=request.settings(args.set),
            base=args.base,
            experts=request.named(args.expert),
            recipe=pathlib.Path(args.recipe).read_text(encoding="utf-8") if args.recipe else "",
            include=args.include,
            dtype=args.dtype,
            task=args.task,
            lora=args.lora,
            extras=request.named_extras(args.extra),
            shard_bytes=request.size(args.shard_size),
        )
    if args.memory:
        wanted = dataclasses.replace(wanted, memory=request.size(args.memory))
    if not args.out and not args.dry_run:
        raise ValueError("say where to write: --out OUT (or --dry-run to see the plan only)")
    _start(args, wanted, earlier, hashing)


def _start(args: argparse.Namespace, wanted, earlier, hashing) -> None:
    from taskvec.commands import merge, prepare, show
    from taskvec.io.progress import console

    inputs = (earlier or {}).get("inputs", {})
    job = prepare.prepare(wanted, {label: model["pinned"] for label, model in inputs.items()})
    to = merge.target(args.out, job) if args.out else None
    need, free = merge.check_target(to, job, args.overwrite) if to else (job.write_bytes, 0)
    if args.dry_run:
        show.plan(job, _console(), need, free if to else None)
        return
    for note in job.notes:
        console.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)
    with show.bar("merging", job.read_bytes) as update:
        record = merge.execute(job, to, hashing=hashing, earlier=earlier, on_progress=update)
    console.print(f"{args.out}: {len(job.specs)} tensors in {record['seconds']} s", highlight=False, markup=False)


def _names(args: argparse.Namespace) -> list[str]:
    """What the arguments and a recipe may name models by: every word of theirs."""
    words = [args.base, *args.expert, *args.extra]
    if args.recipe and pathlib.Path(args.recipe).is_file():
        words += pathlib.Path(args.recipe).read_text(encoding="utf-8", errors="replace").split()
    return [word.strip("\"',") for word in words for word in (word, word.partition("=")[2]) if word]


def _methods(args: argparse.Namespace) -> None:
    from taskvec.commands import methods

    methods.one(args.name, _console()) if args.name else methods.everything(_console())


def _inspect(args: argparse.Namespace) -> None:
    from taskvec.commands import inspect, request

    inspect.run(args.base, request.named(args.experts), _console(), args.include, args.density, args.plot)


def _console():
    """Standard output, as wide as tables need where it is no terminal."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=160)
