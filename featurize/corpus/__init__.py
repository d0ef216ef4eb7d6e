"""Making corpora (contract 1): packing new tars and adopting existing ones. Reading them is `olavlm.data.corpus`."""

import glob
import re
from pathlib import Path

from featurize.corpus.adopt import adopt
from featurize.corpus.pack import pack_caption_folder, pack_llava_json
from featurize.corpus.samples import PackReport, Progress
from olavlm.config import CaptionFolderSource, LlavaJsonSource, WebDatasetSource
from olavlm.data.objects import AnyPath, as_path
from olavlm.errors import OlaError


def build(
    source: LlavaJsonSource | CaptionFolderSource | WebDatasetSource, out: Path, progress: Progress | None = None
) -> PackReport:
    """Make (or grow) the corpus in `out` from a pipeline's `source`; what the corpus has already is skipped.

    Raises:
        OlaError: the source is missing or holds nothing usable; the message names the file.
    """
    match source:
        case LlavaJsonSource():
            roots = [Path(root) for root in source.image_roots]
            return pack_llava_json(Path(source.json_file), roots, out, source.samples_per_tar, progress)
        case CaptionFolderSource():
            return pack_caption_folder(Path(source.folder), out, source.samples_per_tar, progress)
        case WebDatasetSource():
            tars = _matching(source.tars)
            if not tars:
                raise OlaError(f"source.tars: no file matches {source.tars!r}")
            return adopt(tars, out, progress)


def _matching(pattern: str) -> list[AnyPath]:
    """The tars a glob matches, on a disk or in an object store, sorted."""
    if "://" not in pattern:
        return [Path(path) for path in sorted(glob.glob(pattern, recursive=True))]
    fixed = re.split(r"[*?[]", pattern)[0].rpartition("/")[0]
    return sorted(as_path(fixed).glob(pattern[len(fixed) + 1 :]), key=str)
