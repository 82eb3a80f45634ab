"""A real server process in front of the fake engine. Its only argument: ServerSettings as a JSON object."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from aphroquant.engine.types import EngineConfig
from aphroquant.errors import AphroquantError
from aphroquant.server.logs import set_up_logging
from aphroquant.server.serving import serve
from aphroquant.server.settings import ServerSettings

CHAT_TEMPLATE = """\
{%- for message in messages %}
{%- if 'REFUSE' in message.content %}{{ raise_exception('no such roles') }}{% endif %}
{%- if 'DIVIDE' in message.content %}{{ 1 / 0 }}{% endif %}
{%- if 'ESCAPE' in message.content %}{{ ''.__class__.__mro__ }}{% endif %}
{{- '<' + message.role + '>' + message.content }}
{%- endfor %}
{%- if enable_thinking is defined %}{{ '<thinking ' ~ enable_thinking ~ '>' }}{% endif %}
{{- '<assistant>' }}"""


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose token ids are the bytes of the text."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2's byte alphabet: these stand for themselves
    others = [byte for byte in range(256) if byte not in plain]
    vocab = {chr(byte): byte for byte in plain} | {chr(256 + rank): byte for rank, byte in enumerate(others)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)
    fast.chat_template = CHAT_TEMPLATE
    return fast


def main() -> None:
    settings = ServerSettings(**{"port": 0, "served_model_name": "fake", **json.loads(sys.argv[1])})
    set_up_logging(settings.log_level)
    command = (sys.executable, str(Path(__file__).with_name("fake_engine.py")))
    try:
        serve(
            EngineConfig(model="fake"),
            settings,
            announce=lambda line: print(line, flush=True),
            engine_command=command,
            tokenizer_loader=lambda _: byte_tokenizer(),
        )
    except AphroquantError as error:
        print(f"error: {error.message}", error.hint, sep="\n", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
