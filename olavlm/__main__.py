"""``python -m olavlm``: talk to a student, bring published checkpoints in, take students out."""

import argparse
import sys
from collections import Counter
from pathlib import Path

from olavlm import cli

EXAMPLES = """examples:
  python -m olavlm chat runs/demo/finetune/model scene.png
  python -m olavlm chat runs/demo/finetune/model scene.png --once "How many cubes are there?"
  python -m olavlm convert OLA-VLM-CLIP-ViT-Llama3-8b students/ola-llama3
  python -m olavlm convert checkpoint students/mine --vision-tower clip-vit-large-patch14-336
  python -m olavlm export --plain students/ola-llama3 plain/ola-llama3

convert reads folders and hub ids, chat and export a student's folder. What is there already is never overwritten.
"""


def main() -> int:
    """Parse the command line and run one command; imports are deferred so that `--help` is quick."""
    parser = argparse.ArgumentParser(
        prog="python -m olavlm", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=cli.Command)

    help_text = "questions about an image, answered in the terminal with the student alone"
    chat = commands.add_parser("chat", help=help_text, description=help_text)
    chat.add_argument("model", type=Path, metavar="MODEL", help="a student's folder")
    chat.add_argument("image", type=Path, metavar="IMAGE", help="JPEG, PNG, WebP …")
    chat.add_argument("--once", metavar="QUESTION", help="answer this and end")
    chat.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="per answer (%(default)s)")
    chat.set_defaults(command=_chat)

    help_text = "a published OLA-VLM checkpoint (PT, VPT or IFT; Llama or Phi-3) as a student's folder"
    convert = commands.add_parser("convert", help=help_text, description=help_text)
    convert.add_argument("checkpoint", metavar="CHECKPOINT", help="folder or hub id")
    convert.add_argument("out", type=Path, metavar="OUT", help="a new folder")
    convert.add_argument("--vision-tower", metavar="CLIP", help="folder or hub id (default: what the checkpoint names)")
    convert.add_argument("--language-model", metavar="LLM", help="folder or hub id, if the checkpoint holds none")
    convert.set_defaults(command=_convert)

    help_text = "a student as a folder that needs nothing of this package"
    export = commands.add_parser("export", help=help_text, description=help_text)
    export.add_argument("--plain", action="store_true", required=True, help="as a stock LlavaForConditionalGeneration")
    export.add_argument("model", type=Path, metavar="MODEL", help="a student's folder")
    export.add_argument("out", type=Path, metavar="OUT", help="a new folder")
    export.set_defaults(command=_export)

    args = parser.parse_args()
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    return args.command(args) or 0


def _chat(args: argparse.Namespace) -> int:
    import torch

    from olavlm.chat import Chat, converse, load_image
    from olavlm.model.export import load_for_inference

    image = load_image(args.image)
    model, processor = load_for_inference(args.model)
    model.to("cuda" if torch.cuda.is_available() else "cpu")  # type: ignore[arg-type]
    chat = Chat(model, processor, image)
    if args.once is None:
        return converse(chat, args.max_new_tokens)
    chat.ask(args.once, args.max_new_tokens)
    return 0


def _convert(args: argparse.Namespace) -> None:
    from olavlm.model.convert import convert

    account = convert(args.checkpoint, args.out, vision_tower=args.vision_tower, language_model=args.language_model)
    print(f"{len(account.renamed)} tensors kept")
    for reason, count in Counter(account.dropped.values()).items():
        print(f"{count} dropped: {reason}")
    for where, count in Counter(account.supplied.values()).items():
        print(f"{count} supplied by {where}")
    if account.initialised:
        print(f"{len(account.initialised)} new: {', '.join(account.initialised)}")
    print(f"every name is in {args.out / 'conversion.json'}")


def _export(args: argparse.Namespace) -> None:
    from olavlm.model.export import export_plain, image_text, load_for_inference

    model, processor = load_for_inference(args.model)
    export_plain(model, processor, args.out)
    print(f"{args.out}: LlavaForConditionalGeneration and LlavaProcessor; its chat template writes the task tokens")
    print(f"without the template, write for every image: {image_text(processor)}")


if __name__ == "__main__":
    sys.exit(cli.run(main))
