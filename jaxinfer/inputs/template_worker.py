"""Worker process that renders chat templates; `jaxinfer.inputs.templates` runs this file as a script.

Templates come from the Hub or from requests and are untrusted. A single C call made by a template can take hours or
terabytes while it holds the GIL, so limits inside the server process cannot stop it. In the worker, the kernel kills
the process when a render takes too long, and denies memory beyond `MEMORY`.

The environment is that of transformers' `apply_chat_template`: Jinja's immutable sandbox with `tojson`,
`raise_exception`, `strftime_now`, loop controls and `{% generation %}`. Only Jinja and the standard library are
imported, so that a worker starts in a tenth of a second.

Protocol: a request on stdin is a length of 8 bytes and a marshalled tuple: the operation ("describe" or "render"), the
limits in seconds and characters, and arguments. An answer on stdout is a status of one byte (`OK` etc.), a length of 8
bytes, and text.
"""

import functools
import json
import marshal
import signal
import sys
from datetime import datetime

MEMORY = 2**30
"""Address space limit of the process, in bytes."""
OK, FAILED, TOO_LONG, NO_MEMORY = range(4)
TAG = "CONTINUE_FINAL_MESSAGE_TAG "
REASONING = ("reasoning_content", "thinking", "reasoning")
"""Message fields that templates and clients use for reasoning text."""


class TooLong(Exception):
    """Raised when a template's output exceeds the character limit."""


def make_environment():
    """Return a Jinja sandbox equal to the one transformers renders chat templates in."""
    import jinja2
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message):
        raise jinja2.exceptions.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_generation_block(), jinja2.ext.loopcontrols]
    )
    made.filters["tojson"] = tojson
    made.globals.update(
        raise_exception=raise_exception,
        strftime_now=lambda form: datetime.now().strftime(form),
        dict=Dict(),
        namespace=_safe_namespace(),
    )
    return made


class Dict:
    """Replacement of `dict` in templates that hides the attributes of the type."""

    def __call__(self, *args, **kwargs):
        return dict(*args, **kwargs)

    def fromkeys(self, *args, **kwargs):
        return dict.fromkeys(*args, **kwargs)


def _generation_block():
    """Return the Jinja extension of `{% generation %}`."""
    import jinja2.ext
    import jinja2.nodes

    class Generation(jinja2.ext.Extension):
        """`{% generation %}` block, which marks assistant text for training; its body is rendered unchanged."""

        tags = frozenset({"generation"})

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

        def _body(self, caller):
            return caller()

    return Generation


def _safe_namespace():
    """Return the class of `namespace` in templates, which refuses private names."""
    import jinja2

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

    return Namespace


environment = functools.cache(make_environment)


@functools.lru_cache(maxsize=32)
def compiled(source):
    """Compile a template, cached by source."""
    return environment().from_string(source)


def write(source, most, variables):
    """Render a template to a string; raise TooLong beyond `most` characters."""
    pieces, total = [], 0
    for piece in compiled(source).generate(**variables):
        total += len(piece)
        if total > most:
            raise TooLong
        pieces.append(piece)
    return "".join(pieces)


def render(source, most, chat, variables, field):
    """Render a conversation; `field`: field of the last message that the answer continues, None for a new message."""
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
    # If the template strips the message, it has stripped the space at the end of the tag as well.
    return made[:at] if made.startswith(TAG, at) else made[:at].rstrip()


def _with_reasoning(message):
    """Return the message with its reasoning text copied to the field names that templates read."""
    text = next((message[name] for name in REASONING if message.get(name) is not None), None)
    return message if text is None else {"thinking": text, **message, "reasoning_content": text}


def _tag(source, chat, field):
    """Append `TAG` to the text to continue, in place, and return the original text."""
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
"""Probe words that occur in no template."""
_TEXT = "".join(MARKS)
_USER = {"role": "user", "content": "Hi"}


def _calling(arguments):
    """Return an assistant message that calls a tool."""
    call = {"id": "abcdefghi", "type": "function", "function": {"name": "f", "arguments": arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


_CALL = _calling({"x": 1})
_PLACES = (((), ()), ((), (_USER,)), ((_USER,), ()), ((_USER, _CALL), ()), ((_USER, _calling('{"x": 1}')), ()))
"""Messages to place (before, after) the probed message: templates reject some orders of roles."""


def describe(source, most, role, variables):
    """Detect which content forms a template accepts for a role, by rendering probe messages.

    Returns:
        A string of letters: "s" if content may be a string, "p" if it may be a list of parts, "o" if the content of a
        tool message may be an object, "j" if tool-call arguments must be a JSON string, "i" if the template handles
        images.
    """

    def try_to_write(*messages):
        try:
            return write(source, most, {**variables, "messages": messages, "add_generation_prompt": False})
        except MemoryError:
            raise
        except Exception:  # templates raise any exception type on unsupported messages
            return None

    compiled(source)  # raises on invalid Jinja
    found = "i" if _names_images(source) else ""
    if role == "assistant" and try_to_write(_USER, _CALL) is None:
        found += "" if try_to_write(_USER, _calling('{"x": 1}')) is None else "j"
    # Form "o" alone does not prove that the template accepts the role here: `tojson` accepts any value.
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
    """Return the probe words as content, by form."""
    forms = {"s": _TEXT, "p": [{"type": "text", "text": mark} for mark in MARKS]}
    return {**forms, "o": dict([MARKS])} if role in ("tool", "function") else forms


def _shows(made, form):
    """Return whether the output has the probe words as rendered content, not as a Python or JSON dump of it."""
    if form == "s":
        return _TEXT in made
    if form == "o":
        return any(f'"{MARKS[0]}":{blank}"{MARKS[1]}"' in made for blank in ("", " "))
    return all(mark in made and not any(f"{quote}{mark}" in made for quote in "'\"") for mark in MARKS)


def _names_images(source):
    """Return whether a string constant of the template contains "image"."""
    return any(kind == "string" and "image" in text for _, kind, text in environment().lex(source))


def _loops_over_content(source):
    """Return whether a loop of the template iterates over a `content` field; used if every probe fails."""
    from jinja2 import nodes

    def is_content(node):
        while isinstance(node, nodes.Filter) and node.node is not None:
            node = node.node
        if isinstance(node, nodes.Getitem):
            return isinstance(node.arg, nodes.Const) and node.arg.value == "content"
        return isinstance(node, nodes.Getattr) and node.attr == "content"

    return any(is_content(loop.iter) for loop in environment().parse(source).find_all(nodes.For))


def answer(request):
    """Run a request and return the status and text of the answer."""
    what, seconds, most, *rest = request
    if hasattr(signal, "setitimer"):
        # SIGALRM's default action kills the process even inside a C call. The parent times out earlier; this timer
        # covers the case that the parent has died.
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
    """Send a start message, then answer requests until stdin is closed."""
    reply(sink, OK, "")
    while len(head := source.read(8)) == 8:
        reply(sink, *answer(marshal.loads(source.read(int.from_bytes(head, "little")))))


def main():
    """Set the memory limit, import Jinja and serve requests."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ImportError, ValueError, OSError):  # not every system supports resource limits
        pass
    sys.path.extend(sys.argv[1:])
    environment()
    serve(sys.stdin.buffer, sys.stdout.buffer)


if __name__ == "__main__":
    main()
