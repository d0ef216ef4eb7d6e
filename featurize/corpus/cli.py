"""The commands `pack` and `adopt` of ``python -m featurize``."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from featurize.corpus import samples as shared
from featurize.corpus.adopt import adopt
from featurize.corpus.pack import pack_caption_folder, pack_llava_json
from olavlm.cli import Command
from olavlm.data.objects import as_path, local_path

_PACK = "pack LLaVA JSON or captioned images into a corpus, or add what an existing one does not have yet"
_ADOPT = "make a corpus of existing WebDataset tars, or add them to one; only the index is written"
_WORKERS = "processes that read and decode (every core: %(default)s)"


def add_commands(commands: "argparse._SubParsersAction[Command]") -> None:
    """Add `pack` and `adopt`; the parsed arguments carry the function to call as `command`, which takes them."""
    pack = commands.add_parser("pack", help=_PACK, description=_PACK)
    source = pack.add_mutually_exclusive_group(required=True)
    source.add_argument("--llava-json", type=Path, metavar="FILE", help="list of {id, image, conversations}")
    source.add_argument("--captions", type=Path, metavar="DIR", help="images with a .txt caption beside each")
    pack.add_argument(
        "--images", type=Path, nargs="+", metavar="DIR", help="folders the JSON's image paths are relative to"
    )
    pack.add_argument("--out", required=True, help="the corpus folder")
    pack.add_argument("--samples-per-tar", type=_positive, default=1000, metavar="N")
    pack.add_argument("--workers", type=_positive, default=shared.cores(), metavar="N", help=_WORKERS)
    pack.set_defaults(command=_pack, parser=pack)
    tars = commands.add_parser("adopt", help=_ADOPT, description=_ADOPT)
    tars.add_argument("tars", nargs="+", metavar="TAR", help="paths, or URLs like s3://bucket/0.tar")
    tars.add_argument("--out", required=True, help="the corpus folder")
    tars.add_argument("--workers", type=_positive, default=shared.cores(), metavar="N", help=_WORKERS)
    tars.set_defaults(command=_adopt)


@contextmanager
def progress_bar(title: str) -> Iterator[shared.Progress]:
    """A progress bar on the terminal, as what packing and adopting call."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as bars:
        bar = bars.add_task(title, total=None)

        def update(done: int, total: int | None, what: str) -> None:
            bars.update(bar, completed=done, total=total, description=f"{title} ({what})")

        yield update


def print_report(report: shared.PackReport) -> None:
    """Say what became of a source: counts, and where the lists of what was left out or renamed are."""
    console = Console(soft_wrap=True, highlight=False)
    already = f"; {report.already:,} were there already" if report.already else ""
    added = f"{report.tars:,} tars, {report.samples:,} samples, {report.images:,} images"
    console.print(f"{report.out}: added {added}{already}", markup=False)
    for issues, name, what in (
        (report.left_out, "left_out.jsonl", "left out or undecodable"),
        (report.renamed, "renamed.jsonl", "packed under a key with a hash, their id not being unique"),
    ):
        if issues:
            console.print(f"{len(issues):,} {what}, all listed in {report.out / name}:", markup=False)
            for issue in issues[:5]:
                line = f"  {issue.file}: {issue.reason}"
                console.print(line.encode(errors="backslashreplace").decode(), markup=False)  # names may be no Unicode


def _pack(args: argparse.Namespace) -> None:
    if bool(args.llava_json) != bool(args.images):
        args.parser.error("--llava-json needs --images, and --captions goes without")
    common: dict[str, Any] = {"samples_per_tar": args.samples_per_tar, "workers": args.workers}
    out = local_path(args.out)
    with progress_bar(f"packing {out}") as progress:
        if args.llava_json:
            report = pack_llava_json(args.llava_json, args.images, out, progress=progress, **common)
        else:
            report = pack_caption_folder(args.captions, out, progress=progress, **common)
    print_report(report)


def _adopt(args: argparse.Namespace) -> None:
    tars, out = [as_path(tar) for tar in args.tars], local_path(args.out)
    with progress_bar(f"adopting into {out}") as progress:
        report = adopt(tars, out, progress, args.workers)
    print_report(report)


def _positive(text: str) -> int:
    if not (text.isdigit() and int(text)):
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, found {text!r}")
    return int(text)
