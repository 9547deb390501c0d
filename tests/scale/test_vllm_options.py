"""vLLM's own options: by its names and no others, none that says what a field here says, and what arrives in the engine."""

from __future__ import annotations

import sys

import pytest

from scale.config import ScaleConfig, check
from scale.vllm_options import CONTRADICTS, SPOKEN_FOR, check_options, option_names, with_float32_head
from tppo_ref.method.errors import UserError
from tppo_ref.runs.parsing import field_paths, parse, replace_fields

KNOWN = frozenset({"max_num_seqs", "hf_overrides", "enforce_eager", *SPOKEN_FOR, *CONTRADICTS})


def test_options_of_vllm_pass():
    check_options({"max_num_seqs": 4, "hf_overrides": {"rope_theta": 1e6}, "enforce_eager": True}, KNOWN)


@pytest.mark.parametrize("name", SPOKEN_FOR)
def test_what_a_field_says_is_refused_with_the_field(name):
    with pytest.raises(UserError) as error:
        check_options({name: 1}, KNOWN)
    assert str(error.value) == f"engine.vllm.{name}: got 1; expected it left out; give {SPOKEN_FOR[name]}"
    for field in SPOKEN_FOR[name].split(" and "):
        assert field in field_paths(ScaleConfig)


@pytest.mark.parametrize("name", CONTRADICTS)
def test_what_would_break_a_promise_is_refused_with_the_promise(name):
    with pytest.raises(UserError, match=rf"^engine\.vllm\.{name}: got 1; expected it left out: .{{15,}}; drop it$"):
        check_options({name: 1}, KNOWN)


@pytest.mark.parametrize(("name", "value", "promise"), [
    ("kv_transfer_config", {"kv_connector": "LMCacheConnectorV1", "kv_role": "kv_both"}, "a sync drops every cached prefix"),
    ("kv_offloading_size", 64, "a sync drops every cached prefix"),
    ("enable_batch_sharded_sampling", True, "ranks would sample for each other"),
])  # fmt: skip
def test_keys_that_outlive_a_sync_and_ranks_that_sample_for_each_other_are_refused(name, value, promise):
    with pytest.raises(UserError, match=rf"^engine\.vllm\.{name}: got .*; expected it left out: .*{promise}.*; drop it$"):
        check(replace_fields(ScaleConfig(), {"engine.vllm": {name: value}}))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"max_num_seq": 4}, "engine.vllm.max_num_seq: got 4; expected an option of vLLM's EngineArgs; did you mean max_num_seqs?"),
        (
            {"hf_overrides": {"head_dtype": "bfloat16"}},
            "engine.vllm.hf_overrides: got {'head_dtype': 'bfloat16'}; expected no head_dtype",
        ),
        ({"hf_overrides": "head"}, "engine.vllm.hf_overrides: got 'head'; expected names and values"),
    ],
)
def test_a_wrong_option_is_one_line(options, expected):
    with pytest.raises(UserError) as error:
        check_options(options, KNOWN)
    assert str(error.value).startswith(expected)
    with pytest.raises(UserError):
        check(replace_fields(ScaleConfig(), {"engine.vllm": options | {"tokenizer": "x"}}))


def test_without_vllm_names_are_left_to_the_machine_that_has_it():
    check_options({"no_such_option": 1}, frozenset())


def test_they_come_from_the_command_line():
    config = parse(ScaleConfig, ["--engine.vllm", "{max_num_seqs: 7}", "--engine.vllm.enforce_eager", "true"], prog="test")
    assert config.engine.vllm == {"max_num_seqs": 7, "enforce_eager": True}


def test_the_output_head_is_float32_beside_other_overrides():
    assert with_float32_head({"seed": 1, "hf_overrides": {"a": 2}}) == {
        "seed": 1,
        "hf_overrides": {"a": 2, "head_dtype": "float32"},
    }


def test_every_name_in_the_tables_is_vllms(needs_vllm):
    assert {*SPOKEN_FOR, *CONTRADICTS} <= option_names()


def test_reading_the_names_imports_nothing_of_vllm(needs_vllm):
    """That they are the dataclass's own is held where vLLM is imported anyway: test_vllm_engine.py."""
    option_names()
    assert "vllm" not in sys.modules
