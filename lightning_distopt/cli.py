"""The command `lightning-distopt`: LightningCLI's fit, validate, test and predict, and commands of this package."""

from __future__ import annotations

import importlib
import inspect
import os
import pydoc
import re
import sys
from argparse import Action
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, NoReturn

import docstring_parser
import lightning.pytorch as pl
from jsonargparse import ActionConfigFile
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import Strategy, StrategyRegistry
from lightning.pytorch.utilities.exceptions import MisconfigurationException

# What has been imported can be given by its short name, such as `--model ImageClassifier`.
from lightning_distopt import __version__, callbacks, data, models, strategies  # noqa: F401
from lightning_distopt.algorithms import ALGORITHMS, GossipAlgorithm, SyncPeriod
from lightning_distopt.compression import COMPRESSORS, Compressor
from lightning_distopt.data import PARTITIONERS, Partitioner
from lightning_distopt.data.partition_report import partition
from lightning_distopt.demo import demo
from lightning_distopt.federated import AGGREGATORS, Aggregator
from lightning_distopt.listing import listing, options
from lightning_distopt.lookup import closest
from lightning_distopt.new import new
from lightning_distopt.plan.report import plan
from lightning_distopt.sparsity import METHODS, PruningMethod
from lightning_distopt.topologies import TOPOLOGIES, Topology
from lightning_distopt.topologies.report import topology

__all__ = ["COMMANDS", "completion", "main"]

_NAME = "lightning-distopt"
_STRATEGIES = {
    name: entry["strategy"]
    for name, entry in StrategyRegistry.items()
    if entry["strategy"].__module__.startswith("lightning_distopt.")
}
_NAMED_CLASSES = (
    Aggregator,
    Callback,
    Compressor,
    GossipAlgorithm,
    LightningDataModule,
    LightningModule,
    Logger,
    Partitioner,
    PruningMethod,
    Strategy,
    SyncPeriod,
    Topology,
)
_OPTION_NOT_ACCEPTED = re.compile(r"(?:Option|Key) '([\w.]+)' is not (?:accepted|expected)")
_FRAMING = re.compile(
    r"Does not validate|Subtypes:|Errors:|Given value|Problem with|Unexpected import path|Type .+ expects a function|"
    r"Expected an? (<class|typing|Literal|path|config path|dot import path)"
)
_NO_SUCH_STRATEGY = re.compile(r"invalid strategy name: `strategy='(\S+)'`")
_NO_SUCH_CLASS = re.compile(r"Expected a dot import path string: (\S+)")
_NO_SUCH_MODULE = re.compile(r"class_path '([\w.]+)':\s*No module named '([\w.]+)'")


def completion(shell: Literal["bash", "zsh", "tcsh"]) -> None:
    """Print the script with which a shell completes commands and options.

    Example:
        >>> completion("bash")  # doctest: +SKIP

    Args:
        shell: Which shell.

    Raises:
        ImportError: If shtab is not installed.
    """
    try:
        shtab = importlib.import_module("shtab")
    except ModuleNotFoundError as error:
        raise ImportError("Completion needs shtab: pip install 'lightning-distopt[cli]'.") from error

    class Completion(_CLI):
        # Not what jsonargparse does with shtab, which takes the options of every class that could be given, in all
        # combinations, and does not come to an end for a Trainer.
        def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
            assert isinstance(parser, _Parser)
            for command in parser.subcommands_action.choices.values():
                known = command._option_string_actions
                known["--config"].complete = shtab.FILE
                if "--trainer.strategy" in known:
                    known["--trainer.strategy"].choices = [*_STRATEGIES, *sorted({c.__name__ for c in _STRATEGIES.values()})]
                    names = {parameter.name for cls in _STRATEGIES.values() for parameter, _ in options(cls)}
                    command._actions += [Action([f"--trainer.strategy.{name}"], name) for name in sorted(names)]
            print(shtab.complete(parser, shell))
            raise SystemExit(0)

    Completion([])


def analyze() -> None:
    """Show curvature, landscapes and paths of trained models, from a configuration and checkpoints."""


COMMANDS: dict[str, Callable[..., Any]] = {
    "new": new,
    "demo": demo,
    "analyze": analyze,
    "strategies": listing("strategies", _STRATEGIES),
    "algorithms": listing("gossip algorithms", ALGORITHMS),
    "aggregators": listing("aggregators of federated learning", AGGREGATORS),
    "pruning": listing("pruning methods", METHODS),
    "compressors": listing("compressors", COMPRESSORS),
    "topologies": listing("topologies", TOPOLOGIES),
    "topology": topology,
    "partitioners": listing("partitioners", PARTITIONERS),
    "partition": partition,
    "plan": plan,
    "completion": completion,
}
"""Commands of this package: typed functions, whose parameters are the options and whose docstrings the help."""


def main(args: ArgsType = None) -> None:
    """Run the command line.

    Example:
        >>> main(["demo", "--quick"])  # doctest: +SKIP

    Args:
        args: Arguments as a list of strings; those of the process by default.

    Raises:
        SystemExit: With status 2 after a mistake in the arguments, which one sentence on stderr describes.
    """
    # Lightning calls methods that jsonargparse deprecates: nothing that who uses the command could change.
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    if args is None:
        args = sys.argv[1:]
        if not getattr(sys.flags, "safe_path", False):
            sys.path.insert(0, os.getcwd())  # an installed command has its own folder there; `python -m` has this one
    if isinstance(args, list) and args[:1] == ["analyze"]:  # which has commands of its own
        importlib.import_module("lightning_distopt.analyze").main(args[1:])
        return
    with _mistakes_in_one_sentence():
        try:
            _CLI(args=args or ["--help"])
        except _CommandChosen as chosen:
            function = COMMANDS[chosen.command]
            positional = [chosen.options.pop(name) for name in _positional_only(function)]
            function(*positional, **chosen.options)


class _CommandChosen(BaseException):
    """Leaves LightningCLI, which would go on to make a model."""

    def __init__(self, command: str, options: dict[str, Any]) -> None:
        self.command, self.options = command, options


class _Parser(LightningArgumentParser):
    """LightningCLI's parser with the commands of this package, and errors of one sentence."""

    subcommands_action: Any = None
    commands: Mapping[str, Callable[..., Any]] = COMMANDS

    def add_subcommands(self, *args: Any, **kwargs: Any) -> Any:
        action = super().add_subcommands(*args, **kwargs)
        for name, function in self.commands.items():
            parser = _command_parser(name, function)
            action.add_subcommand(name, parser, help=parser.description)
        self.subcommands_action = action
        return action

    def add_config_file(self) -> None:
        """Take options from a file; brings `--print_config` with it."""
        self.add_argument("-c", "--config", action=ActionConfigFile, help="Configuration file in YAML or JSON.")

    def error(self, message: str, *args: Any, **kwargs: Any) -> NoReturn:
        if os.environ.get("JSONARGPARSE_DEBUG") or not self.exit_on_error:
            super().error(message, *args, **kwargs)
        commands = self.subcommands_action.choices.values() if self.subcommands_action else []
        _exit(_sentence(message, [option for parser in (self, *commands) for option in parser._option_string_actions]))


def _command_parser(name: str, function: Callable[..., Any]) -> _Parser:
    """Make options from a signature.

    A parameter that is False by default becomes a flag. One without a default is given without its name; so is one that is
    positional only, a text that may be left out.
    """
    documentation = docstring_parser.parse(inspect.getdoc(function) or "")
    parser = _Parser(description=documentation.short_description or "")
    texts = {parameter.arg_name: parameter.description for parameter in documentation.params}
    flags = [p.name for p in inspect.signature(function).parameters.values() if p.default is False]
    for flag in flags:
        parser.add_argument(f"--{flag}", action="store_true", help=texts.get(flag))
    parser.add_config_file()
    positional = _positional_only(function)
    for name in positional:
        parser.add_argument(name, nargs="?", help=texts.get(name))
    parser.add_function_arguments(function, as_group=False, as_positional=True, skip={*flags, *positional})
    return parser


def _positional_only(function: Callable[..., Any]) -> list[str]:
    return [p.name for p in inspect.signature(function).parameters.values() if p.kind == p.POSITIONAL_ONLY]


class _CLI(LightningCLI):
    prog, parser_type = _NAME, _Parser

    def __init__(self, args: ArgsType, **options: Any) -> None:
        super().__init__(
            args=args,
            parser_kwargs={
                "prog": self.prog,
                "description": "Distributed optimization for PyTorch Lightning.",
                "version": __version__,
            },
            # A second run into the same folder, without a logger that numbers its runs, is not a mistake.
            save_config_kwargs={"overwrite": True},
            **options,
        )

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        # LightningCLI takes a class of parsers since 2.6 only.
        parser = self.parser_type(**{"dump_header": [f"lightning.pytorch=={pl.__version__}"], **kwargs})
        parser.add_config_file()
        return parser

    def setup_parser(self, add_subcommands: bool, main_kwargs: dict[str, Any], subparser_kwargs: dict[str, Any]) -> None:
        super().setup_parser(add_subcommands, main_kwargs, subparser_kwargs)
        assert isinstance(self.parser, _Parser)
        for choice in self.parser.subcommands_action._choices_actions:  # Lightning's texts have several sentences
            choice.help = " ".join((choice.help or "").split()).split(". ")[0].rstrip(".")

    def before_instantiate_classes(self) -> None:
        # A class's name alone is a text as well, which Lightning would look for among the registered names.
        trainer = self.config[self.config.subcommand].trainer
        for name, cls in reversed(_STRATEGIES.items()):
            if trainer.strategy in (cls.__name__, f"{__package__}.{cls.__name__}", f"{cls.__module__}.{cls.__name__}"):
                trainer.strategy = name

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        # Not LightningCLI's own, which warns where arguments are given and the process has others.
        self.config = parser.parse_args(args) if isinstance(args, list) else parser.parse_object(args)
        command = self.config.subcommand
        if command in COMMANDS:
            options = parser.instantiate_classes(self.config)[command].as_dict()
            names = inspect.signature(COMMANDS[command]).parameters
            raise _CommandChosen(command, {key: value for key, value in options.items() if key in names})


@contextmanager
def _mistakes_in_one_sentence() -> Iterator[None]:
    """Show what Lightning or this package says about options as a sentence, other errors with their traceback."""
    try:
        yield
    except (MisconfigurationException, ValueError, TypeError, ImportError) as error:
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        module = trace.tb_frame.f_globals.get("__name__", "") if trace is not None else ""
        ours = module.split(".")[0] in ("lightning_distopt", "lightning", "lightning_fabric")
        if str(error).startswith("Does not validate"):  # jsonargparse, where a constructor has refused its arguments
            ours = True
        if os.environ.get("JSONARGPARSE_DEBUG") or not (ours or isinstance(error, MisconfigurationException)):
            raise
        _exit(_sentence(str(error)))


def _exit(sentence: str) -> NoReturn:
    sys.stderr.write(f"{_NAME}: error: {sentence}\n(`{_NAME} COMMAND --help` lists the options.)\n")
    raise SystemExit(2)


def _sentence(message: str, options: Iterable[str] = ()) -> str:
    """Return what matters of a message of the parser, which reports on every type that an option could have had."""
    keys = list(dict.fromkeys(re.findall(r'Parser key "([^"]+)":', message)))
    option = f"`{'.'.join(keys)}`: " if keys else ""
    innermost = message[message.rfind("Parser key") :] if keys else message
    message = re.sub(r'Parser key "[^"]+":', "", message).strip()
    if (match := _OPTION_NOT_ACCEPTED.search(message)) is not None:
        before = re.findall(r"class_path '?([\w.]+)'?", message[: match.start()])  # the last is the innermost
        cls = pydoc.locate(before[-1]) if before else None
        hint = _nearest(match[1], _option_names(cls)) if isinstance(cls, type) else ""
        return f"{option}{getattr(cls, '__name__', 'it')} has no option `{match[1].rpartition('.')[2]}`{hint}."
    if (match := _NO_SUCH_STRATEGY.search(message)) is not None:
        hint = _nearest(match[1], [*StrategyRegistry.available_strategies(), *(cls.__name__ for cls in _STRATEGIES.values())])
        return f"`trainer.strategy`: there is no strategy `{match[1]}`{hint}; `{_NAME} strategies` lists those of this package."
    if (match := re.search(r"Subcommand '\w+' does not accept option '(\S+)'", message)) is not None:
        return f"there is no option `--{match[1]}`{_nearest(f'--{match[1]}', options)}."
    if (match := re.match(r"[Uu]nrecognized arguments: (\S+)", message)) is not None:
        return f"there is no option `{match[1]}`{_nearest(match[1], options)}."
    cause, _, given = re.sub("Given value:|Got value:", "\0", innermost).partition("\0")
    types = re.findall(r"Expected an? (?:<class '([\w.]+)'>|(?:typing\.)?(Literal\[[^]]*\]))", cause)
    types = [name.replace("NoneType", "null") or literal for name, literal in types]
    if (match := _NO_SUCH_MODULE.search(message)) is not None:
        path, module = match.groups()
        if f"{path}.".startswith(f"{module}."):
            to_do = "run the command in its folder, or name that in PYTHONPATH"
            return f"{option}there is no module `{module}` for `{path}`: {to_do}."
        return f"{option}`{path}` can't be imported, as there is no module `{module}`."
    if (match := _NO_SUCH_CLASS.search(message)) is not None:
        hint = _nearest(match[1], [cls.__name__ for base in _NAMED_CLASSES for cls in _subclasses(base)], cutoff=0.7)
        if hint or not {"int", "float"} & set(types):
            return f"{option}there is no class `{match[1]}`{hint}; a class of your own needs its import path."
    reasons = [re.sub(r"^-(\s+|$)", "", line.strip()) for line in message.partition("Not a valid subclass")[0].splitlines()]
    reasons = [reason for reason in reasons if reason and not _FRAMING.match(reason)]
    if types and not reasons:
        types.sort(key="null".__eq__)
        got = given.partition("\0")[0].strip().partition("\n")[0].removesuffix(".")
        return f"{option}expected {' or '.join(dict.fromkeys(types))}{got and f', got {got}'}."
    return option + ("; ".join(dict.fromkeys(reasons)) or " ".join(message.split()))


def _nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    close = closest(name, known, cutoff)
    return f" (did you mean `{close}`?)" if close else ""


def _option_names(cls: type) -> list[str]:
    names = [[*inspect.signature(base.__init__).parameters] for base in cls.__mro__ if base is not object]  # type: ignore[misc]
    settled = getattr(cls, "settled_options", ())
    return names[0] + [name for inherited in names[1:] for name in inherited if name not in settled]


def _subclasses(cls: type) -> Iterator[type]:
    subclass: type
    for subclass in cls.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)
