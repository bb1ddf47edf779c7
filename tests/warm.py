"""Starts scripts in forks of a process that has loaded torch, since loading is most of a short run.

Only for many runs of scripts of our own: a fork has neither the verifier's limits nor its walls.
"""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys

import verify

LOADED = [
    "torch",
    "torch.distributed",
    "torch.nn.functional",
    "numpy",
    "sentencepiece",
    "zstandard",
]


def play(script, folder, environ, output):
    """The child: become the script."""
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environ)
    file = os.open(output, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.argv = [script]
    sys.path[0] = str(folder)
    # Loading has read another environment.
    import torch

    torch.set_num_threads(int(environ["OMP_NUM_THREADS"]))
    runpy.run_path(script, run_name="__main__")


class Fork:
    """What the verifier needs of subprocess.Popen."""

    stdin = stdout = None

    def __init__(self, context, *arguments):
        self.process = context.Process(target=play, args=arguments)
        self.process.start()
        self.pid = self.process.pid

    def wait(self, timeout=None):
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired("fork", timeout)
        return self.process.exitcode


class WarmSandbox(verify.Sandbox):
    """A Sandbox whose runs of one script on one rank are forks."""

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LOADED)

    def start(self, command, folder=None, settings=(), **options):
        if len(command) != 2 or folder is None:
            return super().start(command, folder, settings, **options)
        environ = self.environment(folder, dict(settings))
        return Fork(self.context, command[1], folder, environ, str(folder / "output"))

    def end(self, child):
        if isinstance(child, Fork) and child.process.is_alive():
            os.killpg(child.pid, signal.SIGKILL)
        elif not isinstance(child, Fork):
            super().end(child)
