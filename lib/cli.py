"""Command-line options made from the fields of a dataclass, lists of numbers and layers in them,
and the choice of a device.

    @dataclass(frozen=True)
    class Options:
        top_p: float = option(1.0, "sample among the likeliest tokens of this probability", high=1)

    command_line(Options, __doc__, main)    # --top-p 0.9 reaches main(Options(top_p=0.9))
"""
import argparse
import re
import sys
from contextlib import contextmanager
from dataclasses import field, fields

import torch

MAX_INT64 = 2 ** 63 - 1  # the largest seed


def option(default, help, low=0, high=MAX_INT64, group=None, **kwargs):
    """A field of a configuration dataclass that is a command-line option too. Its value, if it is
    a number, lies within low..high. group: the heading in --help of this and the next options.
    kwargs: as for argparse's add_argument."""
    return field(default=default, metadata={"help": help, "range": (low, high), "group": group,
                                            **kwargs})


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter,
                    argparse.RawDescriptionHelpFormatter):
    """Shows defaults, where there is one to show, and leaves the lines of the text as they are."""

    def _get_help_string(self, action):
        if action.default is None or action.default is False:  # which 0 equals, but is not
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    def error(self, message):  # one clear line instead of argparse's usage and error
        self.fail(f"{message} (--help lists every option)")

    def fail(self, message):
        self.exit(2, f"{self.prog}: {' '.join(message.split())}\n")


def make_parser(config, doc):
    """A Parser with an option for every field of the dataclass; its help opens with the first
    paragraph of `doc` and ends with the commands in it."""
    examples = "\n".join(line for line in doc.splitlines() if line.startswith("    python "))
    parser = Parser(description=doc.split("\n\n")[0], allow_abbrev=False,
                    epilog=f"examples:\n{examples}" if examples else None,
                    formatter_class=HelpFormatter)
    group = parser
    for f in fields(config):
        settings = {key: value for key, value in f.metadata.items()
                    if key not in ("range", "group")}
        group = parser.add_argument_group(f.metadata["group"]) if f.metadata["group"] else group
        if f.type is bool:
            settings["action"] = argparse.BooleanOptionalAction if f.default else "store_true"
        else:
            settings["type"] = f.type
        group.add_argument(flag(f.name), default=f.default, **settings)
    return parser


def flag(name):
    return "--" + name.replace("_", "-")


def check_values(parser, config, values):
    """Refuse empty texts and numbers out of range."""
    for f in fields(config):
        value, (low, high) = values[f.name], f.metadata["range"]
        if isinstance(value, str) and not value.strip():  # or "$FORGOTTEN" would be the default
            parser.error(f"{flag(f.name)} is empty")
        if isinstance(value, (int, float)) and not low <= value <= high:  # nan is in no range
            limit = "or more, and finite" if high == MAX_INT64 else f"to {high:g}"
            parser.error(f"{flag(f.name)} {value}: expected {low:g} {limit}")


def command_line(config, doc, main, arguments=None):
    """Fill the dataclass `config` from the command line and call main(config).

    arguments: a list of words; None means those of the command line. A user's mistake, which is a
    ValueError anywhere below, or a file that cannot be read or written, ends the program with one
    line and exit code 2; Ctrl-C ends it with exit code 130.
    """
    parser = make_parser(config, doc)
    values = vars(parser.parse_args(arguments))
    check_values(parser, config, values)
    with one_line_errors(parser):
        main(config(**values))


@contextmanager
def one_line_errors(parser):
    """A user's mistake, or a file that cannot be used, ends the program with one line. What a
    console's encoding lacks, such as an emoji on Windows, is printed as a question mark."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # notebooks have streams of their own
            stream.reconfigure(errors="replace")
    try:
        yield
    except ValueError as error:
        parser.fail(str(error))
    except OSError as error:
        parser.fail(f"{error.filename}: {error.strerror}" if error.filename
                    else error.strerror or str(error))
    except KeyboardInterrupt:
        parser.exit(130, "\nstopped; what was saved stays as it was\n")


def pick_device(name, dtype="float32"):
    """The torch device called `name` (auto: cuda if there is one, else cpu), printed once."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.split(":")[0] not in ("cpu", "cuda", "mps"):
        raise ValueError(f"--device {name}: choose cpu, cuda, mps or auto")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].split(". ")[0]
        raise ValueError(f"--device {name} cannot be used: {reason}") from None
    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cuda" else "float32"
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # or sums, clocks and memory would be those of the first one
    print(f"device {device}, {dtype}, {torch.get_num_threads()} threads", file=sys.stderr)
    return device


def parse_sizes(text, flag, largest):
    """"256,64" as [64, 256]. ValueError if it says anything else, or more than `largest`."""
    sizes = text.split(",")
    if not all(size.isdigit() and 1 <= int(size) <= largest for size in sizes):
        raise ValueError(f"{flag} {text}: expected whole numbers of 1 to {largest}, "
                         "like 64,256")
    return sorted(set(map(int, sizes)))


def parse_layers(text, count):
    """The layers, of so many, that "4:", "::2" or "0,4,8" names; None for "all"."""
    if text == "all":
        return None
    try:
        numbers = [int(n) if n else None for n in text.split(":" if ":" in text else ",")]
        layers = set(range(count)[slice(*numbers)] if ":" in text else numbers)
    except (ValueError, TypeError):
        layers = set()
    if not layers or not layers <= set(range(count)):
        raise ValueError(f"--lal-layers '{text}': expected all, or layers of 0 to {count - 1}, "
                         "like 2: or ::2 or 0,1")
    return sorted(layers)


def layers_by_encoder(text, routes, count):
    """{kind: layers that LAL writes of its tokens, None for all}: "2:" is for every encoder that
    goes LAL's way, "sslam=2:,clap=0,1" for those it names. routes: {kind: route}."""
    able = [kind for kind, route in routes.items() if route == "lal"]
    named = dict.fromkeys(able, text)
    if "=" in text:
        named = dict(entry.split("=", 1) for entry in re.split(",(?=[a-z]+=)", text))
    if text != "all" and not (named and set(named) <= set(able)):
        raise ValueError(f"--lal-layers '{text}': the encoders that go LAL's way here are "
                         f"{', '.join(able) or 'none'}")
    return {kind: parse_layers(named.get(kind, "all"), count) for kind in routes}
