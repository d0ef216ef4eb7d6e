"""``python -m featurize``: pack a corpus, compute every teacher's targets once, look after them."""

import argparse
import sys
from pathlib import Path
from typing import Any

from olavlm import cli
from olavlm.cli import human_bytes
from olavlm.config import PipelineConfig, load_pipeline

EXAMPLES = """examples:
  python -m featurize pack --llava-json blip_laion_cc_sbu_558k.json --images images --out corpora/llava558k
  python -m featurize plan llava558k-llama3-8b
  python -m featurize measure llava558k-llama3-8b --random-weights
  python -m featurize run demo featurize.executor=inprocess featurize.workers=2
  python -m featurize verify demo --recompute 8

A run that was stopped anywhere goes on where it was when the same command is run again, beside other runs if you like.
"""


def main() -> int:
    """Parse the command line and run one command; imports are deferred so that `--help` is quick."""
    parser = argparse.ArgumentParser(
        prog="python -m featurize", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    added = {
        name: _pipeline_command(commands, name, function, help_text)
        for name, function, help_text in (
            ("plan", _plan, "images, bytes, hours and break-even, without weights or a corpus"),
            ("run", _run, "compute every target that is missing"),
            ("status", _status, "what is committed, failed and missing"),
            ("verify", _verify, "check every target against its checksum and the corpus; exit 1 if one is wrong"),
            ("inspect", _inspect, "a PNG of images beside their decoded targets"),
        )
    }
    added["status"].add_argument("--failed", action="store_true", help="name every image without a target, and why")
    added["verify"].add_argument(
        "--recompute", type=int, default=0, metavar="N", help="also recompute N images per task"
    )
    added["inspect"].add_argument("--data", help="which entry of data (default: the first with targets)")
    added["inspect"].add_argument("--images", type=int, default=8, metavar="N", help="how many (%(default)s)")
    added["inspect"].add_argument("--out", type=Path, help="PNG file (default: RUN/featurize/inspect.png)")
    from featurize import teachers_cli
    from featurize.corpus import cli as corpus_cli

    corpus_cli.add_commands(commands)
    teachers_cli.add_commands(commands)
    args = parser.parse_args()
    return args.command(args) or 0


def _pipeline_command(commands: Any, name: str, function: Any, help_text: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(name, help=help_text, description=help_text)
    command.add_argument("pipeline", help="a name under pipelines/ or the path of a YAML file")
    command.add_argument("overrides", nargs="*", metavar="key.path=value", help="override a key of the pipeline")
    command.set_defaults(command=lambda args: function(load_pipeline(args.pipeline, args.overrides), args))
    return command


def _plan(config: PipelineConfig, _: argparse.Namespace) -> None:
    from rich.console import Console

    from featurize.plan import show

    show(config, Console())


def _run(config: PipelineConfig, _: argparse.Namespace) -> None:
    from featurize.stage import run_pipeline

    summary = run_pipeline(config)
    sizes = ", ".join(f"{task} {human_bytes(size)}" for task, size in summary["bytes_per_image"].items())
    print(f"{summary['images']:,} images, {summary['failed']:,} of them without some target")
    print(f"{human_bytes(summary['bytes'])}; per image {sizes}")
    print(f"last computed: {summary['computed_images']:,} in {summary['seconds']:,} s, {summary['images_per_s']}/s")
    if summary["failed"]:
        print(f"named with reasons in {config.run_dir}/featurize/failed.jsonl")


def _status(config: PipelineConfig, args: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    from featurize.stage import failed_images, open_jobs, status

    console = Console()
    table = Table("data", "task", Column("set", overflow="fold"), "tars", "images", "failed", "missing", "bytes")
    jobs = open_jobs(config)
    for job in jobs:
        for task, target in job.sets.items():
            counts = status(job, task)
            tars = f"{counts['committed']}/{counts['tars']}"
            numbers = [f"{counts[name]:,}" for name in ("ok", "failed", "missing")]
            table.add_row(job.name, task, target.path.name, tars, *numbers, human_bytes(counts["bytes"]))
    console.print(table)
    if args.failed:
        for job in jobs:
            for image in failed_images(job):
                print("{data} {task} tar {tar} sample {key} image {image_index}: {reason}".format(**image))


def _verify(config: PipelineConfig, args: argparse.Namespace) -> int:
    from featurize.verify import verify

    wrong = 0
    for line in verify(config, args.recompute):
        print(line)
        wrong += 1
    print(f"{wrong} things are wrong" if wrong else "every target is there and undamaged")
    return 1 if wrong else 0


def _inspect(config: PipelineConfig, args: argparse.Namespace) -> None:
    from featurize.inspect import pictures, save
    from olavlm.errors import OlaError

    data = args.data or next((name for name, entry in config.data.items() if entry.targets), None)
    if data is None:
        raise OlaError(f"pipeline {config.name}: no entry of data has targets")
    out = args.out or Path(config.run_dir) / "featurize" / "inspect.png"
    save(pictures(config, data, args.images), out)
    print(out)


if __name__ == "__main__":
    sys.exit(cli.run(main))
