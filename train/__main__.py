"""``python -m train``: the training stages and the probes of a pipeline."""

import argparse
import sys

from olavlm import cli
from olavlm.config import load_pipeline

STAGES = """stages:
  pretrain   next-token prediction plus embedding losses against stored targets
  vpt        visual pretraining on captions (optional)
  finetune   instruction tuning
  probe      what each layer of the frozen students knows of each teacher's features

examples:
  python -m train pretrain demo
  python -m train pretrain llava558k-llama3-8b --dry-run
  python -m train pretrain demo "student.layers.depth=[3]" run_dir=runs/demo-depth3
  torchrun --nproc-per-node 8 -m train pretrain llava558k-llama3-8b

A stage that was stopped goes on from its newest checkpoint when the same command is run again,
on any number of processes.
"""


def main() -> int:
    """Parse the command line and run one stage; imports are deferred so that `--help` is instant."""
    parser = argparse.ArgumentParser(
        prog="python -m train",
        description=__doc__,
        epilog=STAGES,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("stage", choices=["pretrain", "vpt", "finetune", "probe"])
    parser.add_argument("pipeline", help="a name under pipelines/ or the path of a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="override a key of the pipeline")
    parser.add_argument("--dry-run", action="store_true", help="print what it would take; train nothing")
    args = parser.parse_intermixed_args()  # --dry-run may stand anywhere

    config = load_pipeline(args.pipeline, args.overrides)
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    if args.dry_run:
        from train.plan import plan

        plan(config, args.stage)
    elif args.stage == "probe":
        from train.probe import probe

        probe(config)
    else:
        from train.stage import run

        run(config, args.stage)
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
