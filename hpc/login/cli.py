"""argv -> one call -> what is printed. Errors are caught here, once."""

from __future__ import annotations

import argparse
import errno
import io
import json
import os
import sys
from collections.abc import Sequence
from typing import IO, Any

from hpc import __version__
from hpc.core.errors import HpcError, UsageError, did_you_mean
from hpc.login import streams, talk

_EXIT_CODES = """exit codes:
  0 done   1 failed   2 wrong usage or settings   3 refused: the plan cannot work
  4 Slurm or Apptainer not reachable, or the job was rejected   5 endpoint not ready
  6 verification failed   7 no such run, job or stage   8 stopped, resumable   130 interrupted"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = argparse.Namespace(json="--json" in arguments)  # until they are read
    streams.open_closed()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a bar or a name that the locale can't write is no reason to fail
            stream.reconfigure(errors="replace")
    try:
        there = None
        if _of_elsewhere(arguments):
            from hpc.login import via

            there, arguments = via.take(arguments, os.environ)
            if there and arguments[:1] != ["tunnel"]:
                return via.run(there, arguments)
        arguments, program = _own(arguments)
        options = parser().parse_args(arguments)
        options.program = program
        if options.command is None:
            parser().print_help()
            return 0
        if there:
            from hpc.login import laptop

            explains = options.explain is not None or options.stop
            return via.run(there, arguments) if explains else laptop.run(there, options)
        if options.command == "tunnel" and (options.open or options.once):
            raise UsageError("--open and --once are for the laptop", hint="name the login node: --via [USER@]HOST")
        from hpc.login import commands

        code: int = getattr(commands, options.command)(options)
        sys.stdout.flush()
        return code
    except HpcError as error:
        return _say(error.message, error.hint, error.exit_code, options)
    except KeyboardInterrupt:
        return _say("interrupted", "jobs that were submitted go on", 130, options)
    except BrokenPipeError:  # `hpc logs | head`
        streams.to_nowhere(sys.stdout)
        return 0
    except UnicodeEncodeError:
        if (taken := sys.getfilesystemencoding()) != "utf-8":
            return _say(f"names are taken for {taken} here, not for UTF-8 text", "set LC_ALL=C.UTF-8", 2, options)
        return _say("a name or a setting is not UTF-8 text", "check the arguments and the file names", 2, options)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        return _say(
            f"{error.filename or 'the disk'}: {(error.strerror or str(error)).lower()}",
            "make room or ask for quota, then do the same again: nothing that is done was lost"
            if full
            else "check the path and its permissions",
            1 if full else 2,
            options,
        )


def _of_elsewhere(arguments: Sequence[str]) -> bool:
    """True where the command is for another machine, or comes from one."""
    if "HPC_CALLED_BY_SSH" in os.environ:
        from hpc.login import via

        via.end_with_the_caller()
    named = any(word.partition("=")[0] == "--via" for word in arguments)
    return named or bool(os.environ.get("HPC_VIA") and not talk.by_address(arguments))


def _own(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Our own arguments, and those after `--` of `hpc shell`, which are another program's."""
    if arguments[:1] != ["shell"] or "--" not in arguments:
        return arguments, []
    place = arguments.index("--")
    return arguments[:place], arguments[place + 1 :]


def _say(message: str, hint: str, code: int, options: argparse.Namespace) -> int:
    if options.json:
        document = {"schema": "hpc.error/1", "error": message, "hint": hint, "exit_code": code}
        _print(json.dumps(document, ensure_ascii=False), sys.stdout)
    _print(f"error: {message}" + (f"\n  try: {hint}" if hint else ""), sys.stderr)
    return code


def _print(text: str, stream: IO[str]) -> None:
    try:
        print(text, file=stream, flush=True)
    except OSError:  # a full disk, a reader that has left: the exit code still tells
        streams.to_nowhere(stream)


class _Parser(argparse.ArgumentParser):
    """argparse that says `did you mean` and leaves through our own error."""

    def error(self, message: str) -> Any:
        hint = f"`{self.prog} --help` shows what there is"
        if "invalid choice: " in message:
            word = message.partition("invalid choice: '")[2].partition("'")[0]
            named, known = self._choices(message)
            message, hint = f"there is no {named} '{word}'", did_you_mean(word, known)
        raise UsageError(message, hint=hint)

    def _choices(self, message: str) -> tuple[str, list[str]]:
        """The argument whose value is none of its choices, and those."""
        for action in self._actions:
            option = next(iter(action.option_strings), None)
            if action.choices is not None and message.startswith(f"argument {option or action.metavar}"):
                return (option or str(action.metavar).lower()), list(action.choices)
        return "command", list(COMMANDS)


COMMANDS = {
    "stages": "the stages: what each consumes, produces and runs in",
    "plan": "what would run, with which resources; submits nothing",
    "submit": "run a stage or the pipeline, with what it needs and is not there yet",
    "status": "where my runs stand, finished ones too",
    "logs": "what a stage printed",
    "cancel": "end a run's jobs, or one stage's",
    "tunnel": "reach a service from a laptop: waits until it answers, then prints the two steps",
    **talk.SUMMARIES,
    "report": "a run on one HTML page: times, curves, evaluation, what it cost",
    "top": "how much my running stages use their GPUs, live",
    "shell": "a shell, or one program, beside a running stage: on its node, in its container",
    "reset": "end a stage's job and clear what a dead service left; data, notebooks and results stay",
    "menu": "the lab by numbers, for a terminal",
    "images": "the images that stages run in: make, fetch, sign and verify them",
    "doctor": "what is there, what is missing, what to do",
}


def parser() -> argparse.ArgumentParser:
    top = _Parser(
        prog="hpc",
        description="From data to a fine-tuned model to an endpoint, as Slurm jobs in Apptainer images.",
        epilog=_EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"hpc {__version__}")
    top.add_argument(
        "--via", metavar="[USER@]HOST[:FOLDER]", help="run it on that login node, by ssh (default: HPC_VIA)"
    )
    top.set_defaults(command=None, json=False)
    verbs = top.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)
    made = {}
    for name, summary in COMMANDS.items():
        made[name] = verbs.add_parser(
            name, help=summary, description=summary[:1].upper() + summary[1:] + ".", epilog=_EXIT_CODES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        if name not in {"logs", "shell", "menu"}:
            made[name].add_argument("--json", action="store_true", help="one JSON document on stdout")
    _what(made["plan"], nargs="?")
    _what(made["submit"], nargs=None)
    submit = made["submit"]
    submit.add_argument("-n", "--dry-run", action="store_true", help="show exactly what would be submitted")
    submit.add_argument("-w", "--wait", action="store_true", help="wait for the end, with progress")
    submit.add_argument("--replace", action="store_true", help="a job that takes over from the running service")
    status = made["status"]
    status.add_argument("run", nargs="?", metavar="RUN", help="one run; without it the latest ones")
    status.add_argument("-a", "--all", action="store_true", help="every run, however old")
    status.add_argument("--watch", action="store_true", help="again every few seconds, until Ctrl-C")
    for name in ("logs", "cancel"):
        made[name].add_argument("target", nargs="?", metavar="RUN[/STAGE]", help="default: the latest run")
    made["logs"].add_argument("-f", "--follow", action="store_true", help="go on until the stage ends")
    made["logs"].add_argument(
        "-n", "--lines", type=int, metavar="N", help="only the last N lines of stdout and of stderr"
    )
    _tunnel(made["tunnel"])
    talk.add_query(made["query"])
    talk.add_chat(made["chat"])
    talk.add_bench(made["bench"])
    made["report"].add_argument("target", nargs="?", metavar="RUN", help="default: the latest run")
    made["report"].add_argument(
        "-o", "--output", metavar="FILE", help="the page (default: report.html in the run's folder); -: stdout"
    )
    top_ = made["top"]
    top_.add_argument("target", nargs="?", metavar="RUN[/STAGE]", help="default: all of mine")
    top_.add_argument("--interval", type=float, default=2.0, metavar="S", help="seconds between two samples (2)")
    top_.add_argument("--once", action="store_true", help="one sample; so too where no terminal is")
    shell = made["shell"]
    shell.usage = "hpc shell [-h] [--node NAME] [RUN[/STAGE]] [-- PROGRAM ARGUMENTS]"
    shell.add_argument("target", nargs="?", metavar="RUN[/STAGE]", help="default: the latest run")
    shell.add_argument("--node", metavar="NAME", help="one of the job's nodes (default: its first)")
    made["reset"].add_argument("target", metavar="RUN[/STAGE]|STAGE", help="a run, or the latest run of a stage")
    made["reset"].add_argument("-y", "--yes", action="store_true", help="do not ask")
    made["doctor"].add_argument("--site", metavar="NAME", help="the site profile to check")
    _images(made["images"])
    return top


def _tunnel(tunnel: argparse.ArgumentParser) -> None:
    tunnel.add_argument(
        "target", nargs="?", metavar="RUN|STAGE|RUN/STAGE", help="default: the latest service that is at work"
    )
    tunnel.add_argument(
        "--login", metavar="NAME", help="the name to log in with (default: HPC_LOGIN, else asked for); never stored"
    )
    tunnel.add_argument(
        "--host", metavar="HOST", help="the login node as the laptop knows it (default: the site's login_host)"
    )
    tunnel.add_argument(
        "--local-port", type=int, metavar="N", help="the laptop's port (default: 9999; of several, 18000)"
    )
    tunnel.add_argument("--no-wait", action="store_true", help="exit code 5 at once where it does not answer yet")
    tunnel.add_argument("--explain", metavar="TEXT", help="what a message of ssh, browser or Jupyter means; -: stdin")
    tunnel.add_argument("--stop", action="store_true", help="end what runs here for a relay; the job goes on")
    laptop = tunnel.add_argument_group("on the laptop")
    laptop.add_argument(
        "--via", metavar="[USER@]HOST[:FOLDER]", help="the login node: open the tunnel, and keep it open"
    )
    laptop.add_argument("--open", action="store_true", help="show the page in the browser once it answers")
    laptop.add_argument("--once", action="store_true", help="leave when the way is lost, instead of finding it again")


IMAGE_VERBS = {
    "list": "every environment: where its image lies, whether it is up to date",
    "build": "make an image from its recipe, as an ordinary user",
    "pull": "fetch an image, or bring in a file",
    "sign": "add a signature to an image",
    "stage": "copy images to the nodes' own disks ahead of time",
    "verify": "compare images with what was recorded of them, and check signatures",
}


def _images(images: argparse.ArgumentParser) -> None:
    """`hpc images` and its own verbs."""
    images.set_defaults(verb=None, site=None, to=None)
    verbs = images.add_subparsers(dest="verb", metavar="VERB", parser_class=_Parser)
    made = {}
    for name, summary in IMAGE_VERBS.items():
        made[name] = verbs.add_parser(name, help=summary, description=summary[:1].upper() + summary[1:] + ".")
        made[name].add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="one JSON document")
        made[name].add_argument("--site", metavar="NAME", help="the site profile (default: hpc.toml's, else local)")
        if name not in {"sign", "stage"}:
            made[name].add_argument("--to", metavar="FOLDER", help="the folder of images (default: the site's)")
    for name in ("build", "pull", "sign"):
        made[name].add_argument("name", metavar="NAME", help="the environment's name")
        made[name].add_argument("--tmp", metavar="FOLDER", help="a fast disk to work on (default: the site's scratch)")
    for name in ("build", "pull"):
        made[name].add_argument("-f", "--force", action="store_true", help="make it anew, even where it is there")
    build, pull = made["build"], made["pull"]
    build.add_argument(
        "--as", choices=("sif", "venv"), default="sif", dest="kind", help="an image, or a venv where no Apptainer is"
    )
    build.add_argument(
        "--build-arg", action="append", default=[], metavar="NAME=VALUE", help="a value for the recipe; repeatable"
    )
    build.add_argument("--submit", action="store_true", help="build in a CPU job on a compute node")
    build.add_argument("-w", "--wait", action="store_true", help="with --submit: wait for the end, with what it says")
    build.add_argument("-p", "--partition", metavar="NAME", help="with --submit (default: the site's)")
    pull.add_argument("source", metavar="SOURCE", help="docker://…, oras://…, docker-archive:FILE, or a SIF's path")
    pull.add_argument("--auth", metavar="FILE", help="a file of mode 0600: NGC's API key, or Docker's JSON")
    made["sign"].add_argument("--key", metavar="FILE", required=True, help="a private key in PEM")
    stage = made["stage"]
    stage.add_argument("names", nargs="+", metavar="NAME", help="the environments' names")
    stage.add_argument("--nodes", metavar="LIST", help="e.g. dgx[01-03] (default: all of the partition that are up)")
    stage.add_argument("-p", "--partition", metavar="NAME", help="(default: the site's)")
    stage.add_argument("-w", "--wait", action="store_true", help="wait for the end, with progress; say how each ended")
    made["verify"].add_argument("names", nargs="*", metavar="NAME", help="some images (default: all in the folder)")
    made["verify"].add_argument("--engine", metavar="FOLDER", help="an engine: can the image (or these) run it?")
    made["verify"].add_argument("--key", metavar="FILE", help="a public key in PEM (default: the site's verify_key)")


def _what(verb: argparse.ArgumentParser, nargs: str | None) -> None:
    """The options that `plan` and `submit` share; those of Slurm are spelled as in sbatch."""
    optional: dict[str, Any] = {"nargs": nargs, "default": "pipeline"} if nargs else {}
    verb.add_argument("target", metavar="STAGE|pipeline", help="a stage's name, or pipeline", **optional)
    verb.add_argument("--site", metavar="NAME", help="the site profile (default: hpc.toml's, else local)")
    verb.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="assignments",
        help="change a setting, e.g. finetune.lora_r=16; repeatable",
    )  # fmt: skip
    verb.add_argument(
        "--from", metavar="STAGE", dest="first", help="only from this stage on: earlier ones must be done"
    )
    verb.add_argument("--until", metavar="STAGE", dest="last", help="only up to this stage")
    verb.add_argument("--auto", action="store_true", help="build.auto: divide the engine among the fewest GPUs")
    verb.add_argument("-p", "--partition", metavar="NAME")
    verb.add_argument("-A", "--account", metavar="NAME")
    verb.add_argument("-q", "--qos", metavar="NAME")
    verb.add_argument("-t", "--time", metavar="TIME", help="time limit of each stage, as sbatch reads it")


if __name__ == "__main__":
    raise SystemExit(main())
