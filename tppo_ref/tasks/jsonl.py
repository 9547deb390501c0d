"""A user's own prompts and answers: jsonl files, one object per line, and a tokenizer.

    {"prompt": "What is 6 times 7?", "answer": "#### 42"}

The prompt's key is "prompt" or "question", the answer's is "answer"; both can be named. An answer may be a number.
`transformers` is imported only where a tokenizer folder is given, so that the verifier process stays light.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from tppo_ref.method.errors import UserError, refusal
from tppo_ref.method.records import Prompt
from tppo_ref.tasks.json_lines import read_lines
from tppo_ref.tasks.numerals import read_numeral

TOKENIZER_CONFIG = "tokenizer_config.json"
GENERIC = ("TokenizersBackend", "PreTrainedTokenizerFast")
"""What transformers calls a tokenizer that is all in its tokenizer.json."""


class ByteTokenizer:
    """Text as UTF-8 bytes, offline and without files: ids 0 to 255 are the bytes, four special tokens follow.

    The methods are those of a `transformers` tokenizer that this project uses.
    """

    special_tokens = ("<end>", "<pad>", "<user>", "<assistant>")
    eos_token_id = 256
    pad_token_id = 257
    chat_template = "<user>{prompt}<assistant>"

    def __len__(self) -> int:
        return 256 + len(self.special_tokens)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The text's bytes. No special token is ever added or recognised in the text."""
        return list(text.encode("utf-8"))

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """The text of the bytes; invalid UTF-8, and an id that a model with a larger vocabulary sampled, show as U+FFFD."""
        parts, run = [], bytearray()
        for token in token_ids:
            if 0 <= token < 256:
                run.append(token)
                continue
            parts.append(run.decode("utf-8", errors="replace"))
            run.clear()
            special = self.special_tokens[token - 256] if 256 <= token < len(self) else None
            if special is None:
                parts.append("\ufffd")
            elif not skip_special_tokens:
                parts.append(special)
        return "".join(parts) + run.decode("utf-8", errors="replace")

    def save_pretrained(self, folder: str | Path) -> None:
        """Marks a folder, so that `load_tokenizer` gives this tokenizer back."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / TOKENIZER_CONFIG).write_text(json.dumps({"tokenizer_class": type(self).__name__}) + "\n")

    def chat_ids(self, text: str) -> list[int]:
        """A user's turn, and the mark that begins the assistant's."""
        return [258, *self.encode(text), 259]


def final_claim(text: str) -> str | None:
    """The line behind the last "####" of `text`, stripped; None where there is no mark."""
    _, mark, tail = text.rpartition("####")
    return tail.strip().partition("\n")[0].strip() if mark else None


def states_number(text: str) -> bool:
    """Whether `text` ends with "####" and a number, as an answer does and a prompt does not."""
    claim = final_claim(text)
    return claim is not None and read_numeral(claim) is not None and text.rstrip().endswith(claim)


def verify(answer: str, response_token_ids: Sequence[int], response_text: str | None) -> float:
    """The default verifier: +1.0 where the response claims what the reference claims, else -1.0.

    A reference that holds "####" claims the line behind the last one (GSM8K's form), and the response must hold "####" too;
    any other claims all of its text, and so does the response. Two claims are equal as numerals where both are (`numerals`:
    1,000 = 1000.0 = 1e3, and the table of what is a number), else as texts, stripped of white space at their ends.

    GSM8K's own rule takes the number directly behind the first "####" and compares its characters. Here the last mark counts,
    as a correction does; numbers are compared, not characters; and a line that goes on after its number in a way that might
    change it ("#### 5-10", "#### 72 or 73") is a text. ValueError where nothing stands behind the reference's mark.
    """
    text = response_text or ""
    expected, claimed = (final_claim(answer), final_claim(text)) if "####" in answer else (answer.strip(), text.strip())
    if not expected:
        raise ValueError(f"the reference answer {answer[-80:]!r} holds nothing behind its ####")
    if claimed == expected:
        return 1.0
    numeral, other = read_numeral(expected), read_numeral(claimed or "")
    return 1.0 if numeral and other and numeral.same(other) else -1.0


def wrap_reference(answer: str) -> str:
    """The response that states this reference, for `verify`: the reference itself."""
    return answer


def load_tokenizer(tokenizer: str) -> Any:
    """`ByteTokenizer` for "bytes" and for a folder where one was saved, else the `transformers` tokenizer of a folder.

    No code of the folder is ever run. A tokenizer of a generic class is loaded as that: beside a model's config.json,
    AutoTokenizer takes it for one of the model's own class, which may cut texts in other places.
    """
    if tokenizer == "bytes":
        return ByteTokenizer()
    if not Path(tokenizer).is_dir():
        raise UserError(refusal("task.tokenizer", f"{tokenizer!r}, which is no folder", "one written by save_pretrained, or bytes"))
    kind = _tokenizer_class(Path(tokenizer))
    if kind == ByteTokenizer.__name__:
        return ByteTokenizer()
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    loader = PreTrainedTokenizerFast if kind in GENERIC else AutoTokenizer
    try:
        loaded = loader.from_pretrained(tokenizer, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            refusal("task.tokenizer", f"{tokenizer!r}, which cannot be loaded ({reason})", "a tokenizer's folder")
        ) from error
    if loaded.eos_token_id is None:
        raise UserError(refusal("task.tokenizer", f"{tokenizer!r} without an end token", "one", "set its eos_token"))
    return loaded


def _tokenizer_class(folder: Path) -> str:
    """The class that a folder's tokenizer was saved from; empty where it does not say."""
    try:
        return str(json.loads((folder / TOKENIZER_CONFIG).read_bytes())["tokenizer_class"])
    except (OSError, ValueError, LookupError, TypeError):
        return ""


class JsonlTask:
    """Prompts of two jsonl files. Test ids follow the train ids; an "id" in the file is checked and not otherwise used.

    train, test         files; without `test` the last `test_share` of the train file are the test split
    tokenizer           folder of a `transformers` tokenizer, or "bytes"
    chat_template       True: the prompt is a user's turn in the tokenizer's chat template
    verifier            "module:function"; the default is `verify` above, whose rule it states
    prompt_key          "" takes "prompt" or "question"
    max_prompt_tokens   a longer prompt is a UserError, never cut
    """

    name = "jsonl"
    max_response_tokens: int | None = None
    prompt_keys: tuple[str, ...] = ("prompt", "question")

    def __init__(
        self,
        *,
        train: str,
        test: str = "",
        test_share: float = 0.1,
        tokenizer: str = "bytes",
        chat_template: bool = False,
        verifier: str = "tppo_ref.tasks.jsonl:verify",
        prompt_key: str = "",
        answer_key: str = "answer",
        max_prompt_tokens: int = 1024,
    ) -> None:
        if not 0.0 < test_share < 1.0:
            raise UserError(refusal("test_share", f"{test_share}", "a share between 0 and 1"))
        if max_prompt_tokens < 1:
            raise UserError(refusal("task.max_prompt_tokens", f"{max_prompt_tokens}", "at least 1"))
        if prompt_key == answer_key:
            raise UserError(refusal("task.prompt_key", f"{prompt_key!r}, which is task.answer_key too", "two keys"))
        self.options = {
            "train": train, "test": test, "test_share": test_share, "tokenizer": tokenizer,
            "chat_template": chat_template, "verifier": verifier, "prompt_key": prompt_key, "answer_key": answer_key,
            "max_prompt_tokens": max_prompt_tokens,
        }  # fmt: skip
        self.tokenizer = load_tokenizer(tokenizer)
        if chat_template and not self.tokenizer.chat_template:
            raise UserError(refusal("task.chat_template", f"true with {tokenizer!r}, which has none", "false"))
        self.vocab_size = len(self.tokenizer)
        self.end_token_id = int(self.tokenizer.eos_token_id)
        self.verifier = verifier
        self.max_prompt_tokens = max_prompt_tokens
        self._chat = chat_template
        self._prompt_keys = (prompt_key,) if prompt_key else self.prompt_keys
        self._answer_key = answer_key
        self._where: list[str] = []  # file:line of each prompt, by id
        train_prompts = self._read(Path(train), first_id=0)
        if test:
            test_prompts = self._read(Path(test), first_id=len(train_prompts))
        else:
            if len(train_prompts) < 2:
                raise UserError(refusal("task.path", f"{train!r} with one prompt", "at least 2", "or give task.eval_path"))
            num_test = min(len(train_prompts) - 1, math.ceil(test_share * len(train_prompts)))
            train_prompts, test_prompts = train_prompts[:-num_test], train_prompts[-num_test:]
        self._prompts = {"train": tuple(train_prompts), "test": tuple(test_prompts)}
        # The longest there is, not the longest allowed: a model's context has to hold it.
        self.max_prompt_tokens = max(len(prompt.token_ids) for prompt in (*train_prompts, *test_prompts))

    def prompts(self, split: str) -> Sequence[Prompt]:
        """The prompts of "train" or "test", in the order of the file."""
        if split not in self._prompts:
            raise UserError(refusal("split", repr(split), "'train' or 'test'"))
        return self._prompts[split]

    def where(self, prompt_id: int) -> str:
        """file:line of a prompt."""
        return self._where[prompt_id]

    def leave_out(self, prompt_ids: Collection[int]) -> None:
        """Takes train prompts out, those that no response can answer (`references`). UserError where none would be left."""
        kept = tuple(prompt for prompt in self._prompts["train"] if prompt.id not in prompt_ids)
        if not kept:
            raise UserError(refusal("task.path", f"{self.options['train']!r}, all of whose references fail against themselves",
                                    "answers that the verifier can read", "see check-data"))  # fmt: skip
        self._prompts["train"] = kept

    def response_text(self, token_ids: Sequence[int]) -> str:
        """The text that the verifier reads, without special tokens."""
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def describe(self, token_ids: Sequence[int]) -> str:
        """The text with its special tokens."""
        return str(self.tokenizer.decode(list(token_ids)))

    def _read(self, file: Path, first_id: int) -> list[Prompt]:
        prompts: list[Prompt] = []
        lines_by_id: dict[str, int] = {}
        for number, row in self._rows(file):
            where = f"{file}:{number}"
            text = self._text_of(row, self._prompt_keys, where, numbers=False)
            answer = self._text_of(row, (self._answer_key,), where, numbers=True)
            if "id" in row:
                key = json.dumps(row["id"], sort_keys=True)
                if key in lines_by_id:
                    raise UserError(refusal(where, f"id {key}, as in line {lines_by_id[key]}", "unique ids"))
                lines_by_id[key] = number
            if "####" not in answer and states_number(text):
                raise UserError(refusal(where, "a prompt that ends with #### and a number", "an answer that does", "swapped keys?"))
            token_ids = self._encode(text, where)
            if not token_ids:
                raise UserError(
                    refusal(where, "a prompt that encodes to no tokens", "at least one", "is it the model's tokenizer?")
                )
            if self._admits(token_ids, where):
                self._where.append(where)
                prompts.append(Prompt(id=first_id + len(prompts), token_ids=token_ids, answer=answer))
        return prompts

    def _rows(self, file: Path) -> list[tuple[int, dict[str, Any]]]:
        """(line number, row) of a prompt file. scale/ reads other formats here."""
        return read_lines(file)

    def _admits(self, token_ids: Sequence[int], where: str) -> bool:
        """Whether a prompt is taken. Here a longer one than allowed is an error, never cut."""
        if len(token_ids) > self.max_prompt_tokens:
            raise UserError(refusal(where, f"a prompt of {len(token_ids)} tokens", f"at most {self.max_prompt_tokens}",
                                    "shorten or remove it, or raise task.max_prompt_tokens"))  # fmt: skip
        return True

    def _text_of(self, row: dict[str, Any], keys: Sequence[str], where: str, *, numbers: bool) -> str:
        found = [key for key in keys if key in row]
        expected = " or ".join(repr(key) for key in keys)
        if not found:
            raise UserError(refusal(where, f"the keys {', '.join(map(repr, row)) or 'none'}", expected))
        if len(found) > 1:
            raise UserError(refusal(where, f"both {' and '.join(map(repr, found))}", "one of them", "or set task.prompt_key"))
        value = row[found[0]]
        if numbers and isinstance(value, int | float) and not isinstance(value, bool):
            if not math.isfinite(value):
                raise UserError(refusal(f"{where}: {found[0]!r}", f"{value}", "a finite number"))
            return str(value)
        if not isinstance(value, str):
            kind = "a text or a number" if numbers else "a text"
            raise UserError(refusal(f"{where}: {found[0]!r}", type(value).__name__, kind))
        if not value.strip():
            raise UserError(refusal(f"{where}: {found[0]!r}", "nothing but white space", "a text"))
        return value

    def _encode(self, text: str, where: str) -> tuple[int, ...]:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(refusal(where, "a prompt with half of a surrogate pair", "valid Unicode")) from error
        if not self._chat:
            return tuple(self.tokenizer.encode(text))
        if isinstance(self.tokenizer, ByteTokenizer):
            return tuple(self.tokenizer.chat_ids(text))
        turn = [{"role": "user", "content": text}]
        return tuple(self.tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=True, return_dict=False))


__all__ = ["ByteTokenizer", "JsonlTask", "final_claim", "load_tokenizer", "verify", "wrap_reference"]
