"""``python -m pipelines``: whole pipelines, and the stages that are neither featurization nor training."""

import argparse
import json
import sys
from pathlib import Path

from olavlm import cli
from olavlm.config import load_pipeline

EXAMPLES = """examples:
  python -m pipelines run demo                              everything, in minutes, on a CPU
  python -m pipelines run photos run_dir=/tmp/photos        the same code on real photographs
  python -m pipelines run demo "student.layers.depth=[3]" run_dir=runs/demo-depth3
  python -m pipelines sweep demo --over stages.pretrain.contrastive 0 0.3 --over seed 0 1 2
  python -m pipelines see runs/demo/pretrain/model scene.png
  python -m pipelines report demo                           runs/demo/report.html from whatever stages are there
  python -m pipelines compare runs/demo runs/demo-depth3    runs/compare.html: what differs, and whether it matters
  python -m pipelines app runs/demo/finetune/model --layers-of runs/demo/pretrain/model
"""
IMAGES = "samples whose images are shown as the layers see them"


def main() -> int:
    """Parse the command line and run one command; imports are deferred so that `--help` is instant."""
    parser = argparse.ArgumentParser(
        prog="python -m pipelines", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=cli.Command)
    for name, help_text in {
        "run": "every stage that has not finished yet, then the report",
        "corpus": "render, pack or adopt the pipeline's corpora and benchmark",
        "probe-tasks": "decode what the probes predict with the teachers' own heads, and measure it against the truth",
        "evaluate": "run the pipeline's benchmarks on the trained student",
        "report": "write report.html and summary.json from whatever stages are there",
        "show": "print the resolved configuration",
    }.items():
        command = commands.add_parser(name, help=help_text, description=help_text)
        command.add_argument("pipeline", help="a name under pipelines/ or the path of a YAML file")
        command.add_argument("overrides", nargs="*", metavar="key.path=value", help="override a key of the pipeline")
        if name == "report":
            command.add_argument("--images", nargs="+", default=[], metavar="KEY", help=IMAGES)
    help_text = "runs side by side in one page: settings, scores with paired differences, probes, layers, losses"
    compare = commands.add_parser("compare", help=help_text, description=help_text)
    compare.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders; compared with the first")
    compare.add_argument("--out", type=Path, help="the file (default: compare.html in the folder that holds the runs)")
    compare.add_argument("--images", nargs="+", default=[], metavar="KEY", help=IMAGES)
    help_text = "train, probe and evaluate many settings on one store; one table"
    sweep = commands.add_parser("sweep", help=help_text, description=help_text)
    sweep.add_argument("pipeline", help="a name under pipelines/ or the path of a YAML file")
    sweep.add_argument("overrides", nargs="*", metavar="key.path=value", help="override a key in all settings")
    sweep.add_argument(
        "--over",
        nargs="+",
        action="append",
        required=True,
        metavar=("KEY", "VALUE"),
        help="a key and the values it takes; several of them make every combination",
    )
    sweep.add_argument("--jobs", type=int, default=1, help="settings at the same time (%(default)s)")
    teachers = commands.add_parser(
        "teachers", help="train the demo world's teachers and student base from nothing; measure them"
    )
    teachers.add_argument("--out", type=Path, default=Path("runs/teachers"), help="where they go (%(default)s)")
    teachers.add_argument("--quick", action="store_true", help="a few steps each: checks the recipe, not the weights")
    teachers.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help="train these only: seg, depth, student, gen, llm, cues"
    )
    teachers.add_argument("--measure", action="store_true", help="train nothing: gates, comparison and card of --out")
    sheet = commands.add_parser("sheet", help="a PNG of demo world scenes: image, depth, classes, caption, questions")
    sheet.add_argument("--out", type=Path, default=Path("runs/sheet.png"), help="the file (%(default)s)")
    sheet.add_argument("--level", choices=["easy", "hard"], default="easy", help="hard: 128 px, up to nine objects")
    sheet.add_argument("--scenes", type=int, default=5, help="how many (%(default)s)")
    sheet.add_argument("--seed", type=int, default=0, help="another seed, other scenes")
    help_text = "a page of what a student's supervised layers see in an image, beside its teachers' targets"
    see = commands.add_parser("see", help=help_text, description=help_text)
    see.add_argument("model", type=Path, metavar="MODEL", help="a student's folder, saved with its predictors")
    see.add_argument("image", type=Path, metavar="IMAGE", help="JPEG, PNG, WebP …")
    see.add_argument("--pipeline", help="whose teachers and data (default: those of the run that MODEL lies in)")
    see.add_argument(
        "--corpus",
        nargs=2,
        metavar=("CORPUS", "TARGETS"),
        help="look for the nearest images here (default: the first data with targets)",
    )
    see.add_argument("--out", type=Path, help="the file (default: see/IMAGE.html beside MODEL)")
    help_text = "a local page: an image, a question, the answer, and what the layers see"
    app = commands.add_parser("app", help=help_text, description=help_text)
    app.add_argument("model", type=Path, metavar="MODEL", help="the folder of the student that answers")
    app.add_argument(
        "--layers-of",
        type=Path,
        metavar="MODEL",
        help="the student whose layers are shown, saved with its predictors (default: the one that answers)",
    )
    app.add_argument("--pipeline", help="whose teachers and data (default: those of the run that it lies in)")
    app.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s: this computer alone)")
    app.add_argument("--port", type=int, default=8000, help="0: any that is free (%(default)s)")
    bench = commands.add_parser(
        "bench", help="measured ratios: stored targets against online teachers, featurizing against other ways"
    )
    bench.add_argument("--full-size", action="store_true", help="also the published teachers' sizes (random weights)")
    help_text = "many students by a protocol fixed beforehand; tables, a figure and a verdict"
    study = commands.add_parser("study", help=help_text, description=help_text)
    study.add_argument("overrides", nargs="*", metavar="key.path=value", help="override a key for all students")
    study.add_argument("--protocol", type=Path, default=Path("pipelines/study/protocol.yaml"), help="(%(default)s)")
    study.add_argument("--jobs", type=int, default=2, help="students at the same time (%(default)s)")
    codecs = commands.add_parser("codecs", help="bytes, time and loss of every codec, and what it does to a student")
    codecs.add_argument("--out", type=Path, default=Path("runs/codecs"), help="what is there is kept (%(default)s)")
    codecs.add_argument("--seeds", type=int, default=5, help="students per codec (%(default)s)")
    codecs.add_argument("--scenes", type=int, default=384, help="that a student is trained on (%(default)s)")
    codecs.add_argument("--held-out", type=int, default=96, help="scenes it is judged on (%(default)s)")
    codecs.add_argument("--steps", type=int, default=96, help="optimizer steps of a student (%(default)s)")
    args = parser.parse_args()

    if args.command == "teachers":
        from pipelines.demo_world.make_teachers import make_teachers

        make_teachers(args.out, quick=args.quick, only=args.only, train=not args.measure)
        return 0
    if args.command == "sheet":
        from pipelines.demo_world.scenes import LEVELS
        from pipelines.demo_world.sheet import contact_sheet

        args.out.parent.mkdir(parents=True, exist_ok=True)
        contact_sheet(args.out, LEVELS[args.level], args.scenes, args.seed)
        print(args.out)
        return 0
    if args.command == "see":
        from pipelines.see import see as see_layers

        print(see_layers(args.model, args.image, args.pipeline, args.corpus, args.out))
        return 0
    if args.command == "compare":
        from pipelines.compare import compare as compare_runs

        print(compare_runs(args.runs, args.out, args.images))
        return 0
    if args.command == "app":
        from pipelines.app import app as run_app

        run_app(args.model, args.layers_of, args.pipeline, args.host, args.port)
        return 0
    if args.command == "bench":
        from pipelines.bench import bench as run_bench

        run_bench(full_size=args.full_size)
        return 0
    if args.command == "codecs":
        from pipelines.codecs.command import codecs as run_codecs
        from pipelines.codecs.students import Sizes

        run_codecs(args.out, args.seeds, Sizes(args.scenes, args.held_out, args.steps))
        return 0

    if args.command == "sweep":
        from pipelines.sweep import sweep as run_sweep

        return run_sweep(args.pipeline, args.overrides, [(key, values) for key, *values in args.over], args.jobs)

    if args.command == "study":
        from pipelines.study.command import study as run_study

        return run_study(args.protocol, args.overrides, args.jobs)

    config = load_pipeline(args.pipeline, args.overrides)
    if args.command == "run":
        from pipelines.runner import run

        return run(config, args.pipeline, args.overrides)
    if args.command == "corpus":
        from pipelines.corpus import build

        build(config)
    elif args.command == "probe-tasks":
        from pipelines.probe_tasks.stage import probe_tasks

        probe_tasks(config)
    elif args.command == "evaluate":
        from pipelines.evaluate import evaluate

        evaluate(config)
    elif args.command == "report":
        from pipelines.report import report

        report(config, args.images)
    else:
        print(json.dumps(config.model_dump(mode="json"), indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
