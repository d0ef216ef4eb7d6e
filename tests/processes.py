"""Helper of tests: real processes that run a command of ours, forked from one that has imported it all once.

Every line on stdin is a job, every line on stdout its answer: the exit code of each rank (negative: the signal that
ended it) and what they printed. A job is a JSON object:

    module  what `python -m` runs: "train" or "pipelines"
    argv    its arguments
    ranks   how many processes work together, over gloo
    stop    [moment, number, signal]: the process sends itself the signal at its number-th such moment (from 1):
            "step" (before the forward pass), "gradients" (before they are applied), "update" (after they were),
            "disk" (before a name appears, changes or goes in the file system)
    largest bytes that a file may have (RLIMIT_FSIZE)
    seen    a folder; every rank appends the samples of every step to a file in it
"""

import gc
import json
import os
import resource
import socket
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import CLIPImageProcessorPil, CLIPVisionModel, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: F401
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import pipelines.__main__
import pipelines.evaluate
import train.__main__
from olavlm import cli
from train import metrics, stage

# What every child would do again: importing what is imported late, and compiling transformers' thousand patterns.
get_checkpoint_conversion_mapping("llava")
gc.freeze()  # a child that collects garbage would copy every page it looks at
COMMANDS = {"train": train.__main__.main, "pipelines": pipelines.__main__.main}
torch.set_num_threads(1)  # nothing below this process may have started a thread pool when it forks


def before(owner: Any, name: str, act: Any) -> None:
    """Call `act` before every call of a function."""
    real = getattr(owner, name)

    def wrapped(*arguments: Any, **more: Any) -> Any:
        act(*arguments)
        return real(*arguments, **more)

    setattr(owner, name, wrapped)


def install(job: dict[str, Any], rank: int) -> None:
    """What the job asks for besides its command."""
    if "stop" in job:
        moment, left, number = job["stop"]

        def count(*_: Any) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), number)

        for owner, name in {
            "step": [(stage, "accumulate")],
            "gradients": [(stage, "_set_rate")],
            "update": [(metrics.Metrics, "advance")],
            "disk": [(os, name) for name in ("mkdir", "rename", "replace", "link", "unlink", "rmdir")],
        }[moment]:
            before(owner, name, count)
    if "largest" in job:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["largest"], job["largest"]))
    if "seen" in job:

        def note(step: int, values: Any, losses: Any, batches: Any, *_: Any) -> None:
            keys = [key for batch in batches for key in batch.keys]
            with open(Path(job["seen"]) / f"{rank}.jsonl", "a") as file:
                file.write(json.dumps({"step": step, "keys": keys}) + "\n")

        before(stage, "_check_finite", note)

    def check_slices(settings: Any, seed: int, model: Any, parameters: dict[str, Any], *_: Any) -> None:
        sharded = {name for name, p in parameters.items() if isinstance(p, DTensor)}
        of_model = {name for name in parameters if name.startswith(("model.language_model.", "lm_head."))}
        assert sharded == (of_model if settings.fully_shard and job["ranks"] > 1 else set())
        assert all(parameters[name].to_local().numel() < parameters[name].numel() for name in sharded)

    before(stage, "_loop", check_slices)

    def part(*_: Any) -> None:
        if sys.exception():  # with NCCL it would wait here for ranks that wait for it
            os._exit(70)

    before(dist, "destroy_process_group", part)


def fork(job: dict[str, Any], rank: int, port: int, output: int) -> int:
    """One rank in a child; its process id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.dup2(output, 1)
        os.dup2(output, 2)
        if job["ranks"] > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(job["ranks"])}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": ""}
        install(job, rank)
        sys.argv = [job["module"], *job["argv"]]
        code = cli.run(COMMANDS[job["module"]])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


for line in sys.stdin:
    asked = json.loads(line)
    with socket.socket() as free, tempfile.TemporaryFile() as output:
        free.bind(("127.0.0.1", 0))
        number = free.getsockname()[1]
        free.close()
        children = [fork(asked, rank, number, output.fileno()) for rank in range(asked["ranks"])]
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        output.seek(0)
        print(json.dumps({"codes": codes, "output": output.read().decode(errors="replace")}), flush=True)
