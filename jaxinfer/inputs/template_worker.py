"""Render chat templates in a process of their own: run as a script by `jaxinfer.inputs.templates`, imported by nothing.

A template comes from the Hub or from a request. One call into C that it makes may take hours or terabytes while it
holds the interpreter's lock, which no limit inside the process reaches. Here the kernel ends the process when a render
takes too long, and refuses it memory beyond `MEMORY`.

The environment is that of transformers' `apply_chat_template`: Jinja's immutable sandbox with `tojson`,
`raise_exception`, `strftime_now`, loop controls and `{% generation %}`. Only Jinja and the standard library are
imported, so that a process starts in a tenth of a second.

A request on the standard input is 8 bytes of length and a marshalled tuple: what to do ("describe" or "render"), the
limits in seconds and characters, and arguments. An answer on the standard output is one byte (`OK` and the others), 8
bytes of length and text.
"""

import functools
import json
import marshal
import signal
import sys
from datetime import datetime

MEMORY = 2**30
"""Bytes of address space of the process."""
OK, FAILED, TOO_LONG, NO_MEMORY = range(4)
TAG = "CONTINUE_FINAL_MESSAGE_TAG "
REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names under which templates and clients know the reasoning of a message."""


class TooLong(Exception):
    """The output has more characters than the limit."""


def make_environment():
    """Make the sandbox that transformers renders chat templates in."""
    import jinja2
    import jinja2.ext
    import jinja2.nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        """`{% generation %}`, which marks what the assistant wrote, for training; here its body is rendered as it
        is."""

        tags = frozenset({"generation"})

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

        def _body(self, caller):
            return caller()

    class Namespace(jinja2.utils.Namespace):
        def __init__(*args, **kwargs):
            self, values = args[0], dict(*args[1:], **kwargs)
            for name in values:
                Namespace._check(name)
            jinja2.utils.Namespace.__init__(self, values)

        def __setitem__(self, name, value):
            Namespace._check(name)
            jinja2.utils.Namespace.__setitem__(self, name, value)

        @staticmethod
        def _check(name):
            if isinstance(name, str) and name.startswith("_"):
                raise jinja2.exceptions.SecurityError(
                    f"a namespace takes no name with an underscore in front, got {name!r}"
                )

    class Dict:
        """`dict`, without the attributes of the type."""

        def __call__(self, *args, **kwargs):
            return dict(*args, **kwargs)

        def fromkeys(self, *args, **kwargs):
            return dict.fromkeys(*args, **kwargs)

    def raise_exception(message):
        raise jinja2.exceptions.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    made.filters["tojson"] = tojson
    made.globals.update(
        raise_exception=raise_exception,
        strftime_now=lambda form: datetime.now().strftime(form),
        dict=Dict(),
        namespace=Namespace,
    )
    return made


environment = functools.cache(make_environment)


@functools.lru_cache(maxsize=32)
def compiled(source):
    """Compile a template."""
    return environment().from_string(source)


def write(source, most, variables):
    """Render a template to a string of at most `most` characters."""
    pieces, total = [], 0
    for piece in compiled(source).generate(**variables):
        total += len(piece)
        if total > most:
            raise TooLong
        pieces.append(piece)
    return "".join(pieces)


def render(source, most, chat, variables, field):
    """Render a conversation; `field`: of its last message what the answer continues, None for a new answer."""
    chat = [_with_reasoning(message) for message in chat]
    if field is None:
        return write(source, most, {**variables, "messages": chat})
    text = _tag(source, chat, field)
    made = write(source, most + len(TAG), {**variables, "messages": chat})
    if text.strip() not in made or TAG.strip() not in made:
        raise ValueError(
            "continue_final_message is set, but the template leaves out or changes the end of the last message"
        )
    at = made.rindex(TAG.strip())
    # A template that strips the message has stripped the blank at the end of the tag as well.
    return made[:at] if made.startswith(TAG, at) else made[:at].rstrip()


def _with_reasoning(message):
    """The message with its reasoning under the names that templates read."""
    text = next((message[name] for name in REASONING if message.get(name) is not None), None)
    return message if text is None else {"thinking": text, **message, "reasoning_content": text}


def _tag(source, chat, field):
    """Mark the end of the text to continue, in place, and return that text."""
    last = chat[-1]
    text = last.get(field)
    if text is None:
        raise ValueError(f"continue_final_message is set, but the last message has no {field!r} to continue")
    names = [name for name in REASONING if last.get(name) == text] if field in REASONING else [field]
    if not any(name in source for name in names):
        raise ValueError(f"continue_final_message is {field!r}, which the chat template does not read")
    if isinstance(text, (list, tuple)):
        part = next((part for part in reversed(text) if "text" in part), None)
        if part is None:
            raise ValueError("continue_final_message is set, but the last message has no text to continue")
        text = part["text"]
        part["text"] = text + TAG
    else:
        for name in names:
            last[name] = text + TAG
    return text


MARKS = ("Zqa7", "Zqb7")
"""Words that no template has."""
_TEXT = "".join(MARKS)
_USER = {"role": "user", "content": "Hi"}


def _calling(arguments):
    """The message of an assistant that calls a tool."""
    call = {"id": "abcdefghi", "type": "function", "function": {"name": "f", "arguments": arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


_CALL = _calling({"x": 1})
_PLACES = (((), ()), ((), (_USER,)), ((_USER,), ()), ((_USER, _CALL), ()), ((_USER, _calling('{"x": 1}')), ()))
"""What stands before and after the message in question: templates refuse some orders of roles."""


def describe(source, most, role, variables):
    """Find out in which forms a template takes the messages of a role, by rendering some.

    Returns letters: "s" if content may be a string, "p" if it may be a list of parts, "o" if the content of a tool may
        be an
    object, "j" if the arguments of tool calls must be JSON in a string, "i" if the template knows of images.
    """

    def try_to_write(*messages):
        try:
            return write(source, most, {**variables, "messages": messages, "add_generation_prompt": False})
        except MemoryError:
            raise
        except Exception:  # a template may fail in every way on what it does not take
            return None

    compiled(source)  # what is no Jinja fails here
    found = "i" if _names_images(source) else ""
    if role == "assistant" and try_to_write(_USER, _CALL) is None:
        found += "" if try_to_write(_USER, _calling('{"x": 1}')) is None else "j"
    # Objects alone do not show that a template takes a role here: JSON is made of anything.
    for before, after in _PLACES:
        shown = ""
        for form, content in _contents(role).items():
            message = {"role": role, "content": content}
            if role in ("tool", "function"):
                message |= {"tool_call_id": "abcdefghi", "name": "f"}
            made = try_to_write(*before, message, *after)
            shown += form if made is not None and _shows(made, form) else ""
        if "s" in shown or "p" in shown:
            return found + shown
    return found + ("p" if _loops_over_content(source) else "s")


def _contents(role):
    """The marks as content in each form."""
    forms = {"s": _TEXT, "p": [{"type": "text", "text": mark} for mark in MARKS]}
    return {**forms, "o": dict([MARKS])} if role in ("tool", "function") else forms


def _shows(made, form):
    """Whether the marks are there in the sense of their form, and not as the Python or JSON form of what holds them."""
    if form == "s":
        return _TEXT in made
    if form == "o":
        return any(f'"{MARKS[0]}":{blank}"{MARKS[1]}"' in made for blank in ("", " "))
    return all(mark in made and not any(f"{quote}{mark}" in made for quote in "'\"") for mark in MARKS)


def _names_images(source):
    """Whether a string constant of the template has the word "image"."""
    return any(kind == "string" and "image" in text for _, kind, text in environment().lex(source))


def _loops_over_content(source):
    """Whether a loop goes over the content of something: for templates that no probe satisfies."""
    from jinja2 import nodes

    def is_content(node):
        while isinstance(node, nodes.Filter) and node.node is not None:
            node = node.node
        if isinstance(node, nodes.Getitem):
            return isinstance(node.arg, nodes.Const) and node.arg.value == "content"
        return isinstance(node, nodes.Getattr) and node.attr == "content"

    return any(is_content(loop.iter) for loop in environment().parse(source).find_all(nodes.For))


def answer(request):
    """Do what a request says: the status and the text of the answer."""
    what, seconds, most, *rest = request
    if hasattr(signal, "setitimer"):
        # The default action ends the process, whatever it does at that moment. The one who asked gives up earlier; this
        # is for the case that it is gone.
        signal.setitimer(signal.ITIMER_REAL, seconds + 1)
    try:
        return OK, {"describe": describe, "render": render}[what](rest[0], most, *rest[1:])
    except TooLong:
        return TOO_LONG, ""
    except MemoryError:
        return NO_MEMORY, ""
    except Exception as error:
        return FAILED, (str(error) or type(error).__name__)[:4000]
    finally:
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, 0)


def reply(sink, status, text):
    """Write an answer."""
    data = text.encode("utf-8", "surrogatepass")
    sink.write(bytes([status]) + len(data).to_bytes(8, "little") + data)
    sink.flush()


def serve(source, sink):
    """Say that the process has started, then answer requests until there are no more."""
    reply(sink, OK, "")
    while len(head := source.read(8)) == 8:
        reply(sink, *answer(marshal.loads(source.read(int.from_bytes(head, "little")))))


def main():
    """Limit the memory, find Jinja, serve."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ImportError, ValueError, OSError):  # not every system has limits
        pass
    sys.path.extend(sys.argv[1:])
    environment()
    serve(sys.stdin.buffer, sys.stdout.buffer)


if __name__ == "__main__":
    main()
