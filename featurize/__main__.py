"""``python -m featurize``: pack a corpus, compute every teacher's targets once, look after them."""

import argparse
import sys
from functools import partial
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
  python -m featurize run demo --retry-failed
  python -m featurize verify demo --recompute 8
  python -m featurize repair demo
  python -m featurize drop demo depth --yes
  python -m featurize gc demo --dry-run
  python -m featurize export demo --data train --out exported

A run that was stopped anywhere goes on where it was when the same command is run again, beside other runs if you like.
"""


def main() -> int:
    """Parse the command line and run one command; imports are deferred so that `--help` is quick."""
    parser = argparse.ArgumentParser(
        prog="python -m featurize", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=cli.Command)
    added = {
        name: _pipeline_command(commands, name, function, help_text)
        for name, function, help_text in (
            ("plan", _plan, "images, bytes, hours and break-even, without weights or a corpus"),
            ("run", _run, "compute every target that is missing"),
            ("status", _status, "what is committed, failed and missing"),
            ("verify", _verify, "check every target against its checksum and the corpus; exit 1 if one is wrong"),
            ("repair", _repair, "withdraw whatever `verify` finds wrong and compute it again"),
            ("drop", _drop, "remove one target set"),
            ("gc", _gc, "remove what no commit lists: what dead writers left, blocks of lost commits, old leases"),
            (
                "compact",
                _compact,
                "one manifest for many commits, so that a million tars are seen through in seconds",
            ),
            ("export", _export, "join images, text and targets into tars for any WebDataset loader"),
            ("inspect", _inspect, "a PNG of images beside their decoded targets"),
        )
    }
    added["status"].add_argument("--failed", action="store_true", help="name every image without a target, and why")
    added["run"].add_argument(
        "--retry-failed", action="store_true", help="also try images again that were committed as failed"
    )
    for name in ("verify", "repair"):
        added[name].add_argument(
            "--recompute", type=int, default=0, metavar="N", help="also recompute N images per task"
        )
    added["drop"].add_argument("--yes", action="store_true", help="do it (default: only say what would go)")
    added["gc"].add_argument("--dry-run", action="store_true", help="only say what would go")
    for name in ("inspect", "export"):
        added[name].add_argument("--data", help="which entry of data (default: the first with targets)")
    added["export"].add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where the tars go")
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
    if name == "drop":
        command.add_argument("set", help="a task, or a set's folder in the store")
    command.add_argument("overrides", nargs="*", metavar="key.path=value", help="override a key of the pipeline")
    command.set_defaults(command=lambda args: function(load_pipeline(args.pipeline, args.overrides), args))
    return command


def _plan(config: PipelineConfig, _: argparse.Namespace) -> None:
    from rich.console import Console

    from featurize.plan import show

    show(config, Console())


def _run(config: PipelineConfig, args: argparse.Namespace) -> None:
    from featurize.stage import run_pipeline

    _print_summary(config, run_pipeline(config, args.retry_failed))


def _print_summary(config: PipelineConfig, summary: dict[str, Any]) -> None:
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
    found = [(job, job.committed()) for job in open_jobs(config)]
    for job, committed in found:
        for task, target in job.sets.items():
            counts = status(job, task, committed)
            tars = f"{counts['committed']}/{counts['tars']}"
            numbers = [f"{counts[name]:,}" for name in ("ok", "failed", "missing")]
            table.add_row(job.name, task, target.path.name, tars, *numbers, human_bytes(counts["bytes"]))
    console.print(table)
    if args.failed:
        for job, committed in found:
            for image in failed_images(job, committed):
                print("{data} {task} tar {tar} sample {key} image {image_index}: {reason}".format(**image))


def _verify(config: PipelineConfig, args: argparse.Namespace) -> int:
    from featurize.verify import verify

    wrong = 0
    for line in verify(config, args.recompute):
        print(line)
        wrong += 1
    print(f"{wrong} things are wrong" if wrong else "every target is there and undamaged")
    return 1 if wrong else 0


def _repair(config: PipelineConfig, args: argparse.Namespace) -> int:
    from featurize.lifecycle import withdraw_damaged
    from featurize.stage import run_pipeline

    found = busy = 0
    for finding, mended in withdraw_damaged(config, args.recompute):
        print(finding if mended else f"{finding}; another writer is at it, left alone")
        found, busy = found + 1, busy + (not mended)
    if not found:
        print("nothing to repair: every target is there and undamaged")
        return 0
    _print_summary(config, run_pipeline(config))
    print(f"{found - busy} of {found} things that were wrong are repaired")
    return 1 if busy else 0


def _drop(config: PipelineConfig, args: argparse.Namespace) -> None:
    from featurize.lifecycle import drop, find_sets, size

    for target in find_sets(config, args.set):
        tars = sum(1 for _ in (target.path / "commits").glob("[!.]*.parquet"))
        what = f"{target.path}: {tars:,} tars, {human_bytes(size(target.path))}"
        if args.yes:
            drop(target)
        print(f"{what}: removed" if args.yes else f"{what}; --yes removes it")


def _gc(config: PipelineConfig, args: argparse.Namespace) -> None:
    from featurize.lifecycle import gc

    count, freed = 0, 0
    for garbage in gc(config, args.dry_run):
        print(f"{garbage.path}: {garbage.why}, {human_bytes(garbage.bytes)}")
        count, freed = count + 1, freed + garbage.bytes
    print(f"{human_bytes(freed)} in {count:,} places {'would be' if args.dry_run else 'were'} removed")


def _compact(config: PipelineConfig, _: argparse.Namespace) -> None:
    from featurize.progress import track
    from featurize.stage import open_jobs
    from olavlm.data.manifest import compact, manifest_file

    for job in open_jobs(config):
        for task, target in job.sets.items():
            count = compact(target, partial(track, what=f"{job.name}, {task}"))
            file = manifest_file(target)
            print(f"{file}: {count:,} commits, {human_bytes(file.stat().st_size)}")


def _export(config: PipelineConfig, args: argparse.Namespace) -> int:
    from featurize.export import export

    left_out = 0
    for line in export(config, _data_entry(config, args), args.out):
        print(line)
        left_out += 1
    print(f"{args.out}: " + (f"{left_out} tars are not there yet; featurize them first" if left_out else "complete"))
    return 1 if left_out else 0


def _data_entry(config: PipelineConfig, args: argparse.Namespace) -> str:
    """The entry of `data` that is asked for."""
    from olavlm.errors import OlaError

    data: str | None = args.data or next((name for name, entry in config.data.items() if entry.targets), None)
    if data is None:
        raise OlaError(f"pipeline {config.name}: no entry of data has targets")
    return data


def _inspect(config: PipelineConfig, args: argparse.Namespace) -> None:
    from featurize.inspect import pictures, save

    data = _data_entry(config, args)
    out = args.out or Path(config.run_dir) / "featurize" / "inspect.png"
    save(pictures(config, data, args.images), out)
    print(out)


if __name__ == "__main__":
    sys.exit(cli.run(main))
