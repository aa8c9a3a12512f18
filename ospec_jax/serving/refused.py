# SPDX-License-Identifier: Apache-2.0
"""Parameters that cannot be honoured, and what to do instead."""

from typing import Any, NamedTuple

from ospec_jax.serving.values import Values, is_same


class _Refusal(NamedTuple):
    """A parameter that cannot be honoured.

    Attributes:
      remedy: What to do instead.
      neutral: Values that ask for nothing, beside null.
    """

    remedy: str
    neutral: tuple[Any, ...] = ()


NO_TOOLS = "tools are not supported; say in a message what the model should write"
_NO_GRAMMAR = "answers cannot be constrained; say the format in a message"
_NO_TEMPLATE = "the model's own chat template is always used"
NO_AUDIO = "answers are text; leave it out"
REFUSED = {
    "add_generation_prompt": _Refusal(_NO_TEMPLATE, (True,)),
    "allowed_token_ids": _Refusal("use logit_bias"),
    "audio": _Refusal(NO_AUDIO),
    "bad_words": _Refusal("use logit_bias", ([],)),
    "cache_salt": _Refusal("use tenant"),
    "chat_template": _Refusal(_NO_TEMPLATE),
    "chat_template_kwargs": _Refusal(_NO_TEMPLATE, ({},)),
    "continue_final_message": _Refusal(
        "an answer is always a turn of its own; use /v1/completions to go on with a "
        "text",
        (False,),
    ),
    "documents": _Refusal("put their text into a message", ([],)),
    "function_call": _Refusal(NO_TOOLS, ("none",)),
    "functions": _Refusal(NO_TOOLS, ([],)),
    "grammar": _Refusal(_NO_GRAMMAR, ("",)),
    "guided_choice": _Refusal(_NO_GRAMMAR),
    "guided_grammar": _Refusal(_NO_GRAMMAR),
    "guided_json": _Refusal(_NO_GRAMMAR),
    "guided_regex": _Refusal(_NO_GRAMMAR),
    "ignore_eos": _Refusal("an answer ends where the model ends it", (False,)),
    "include_stop_str_in_output": _Refusal(
        "a stop string is never part of the answer", (False,)
    ),
    "json_schema": _Refusal(_NO_GRAMMAR),
    "length_penalty": _Refusal("there is no beam search", (1, 1.0)),
    "logits_processors": _Refusal("use logit_bias and the penalties", ([],)),
    "min_tokens": _Refusal("an answer ends where the model ends it", (0,)),
    "modalities": _Refusal("answers are ['text']", (["text"],)),
    "parallel_tool_calls": _Refusal(NO_TOOLS, (True, False)),
    "prompt_logprobs": _Refusal("only the answer's tokens have log-probabilities"),
    "reasoning_effort": _Refusal("the model does not reason apart", ("none",)),
    "regex": _Refusal(_NO_GRAMMAR),
    "response_format": _Refusal(
        f"{_NO_GRAMMAR}, or use {{'type': 'text'}}", ({"type": "text"},)
    ),
    "skip_special_tokens": _Refusal("special tokens are never shown", (True,)),
    "stop_token_ids": _Refusal("use stop, with strings", ([],)),
    "structured_outputs": _Refusal(_NO_GRAMMAR),
    "suffix": _Refusal("only what follows a prompt can be completed", ("",)),
    "tool_choice": _Refusal(NO_TOOLS, ("none",)),
    "tools": _Refusal(NO_TOOLS, ([],)),
    "top_a": _Refusal("use top_p or min_p", (0, 0.0)),
    "truncate_prompt_tokens": _Refusal("shorten the prompt"),
    "typical_p": _Refusal("use top_p or min_p", (1, 1.0)),
    "use_beam_search": _Refusal("there is no beam search", (False,)),
    "verbosity": _Refusal("say in a message how long answers should be", ("medium",)),
    "web_search_options": _Refusal("there is no search"),
}


def refuse_unsupported(values: Values, is_chat: bool) -> None:
    """Refuses a body that asks for what there is not.

    Raises:
      RequestError: It does.
    """
    for name, refusal in REFUSED.items():
        value = values.get(name)
        if value is None or any(is_same(value, x) for x in refusal.neutral):
            continue
        raise values.refusal(name, refusal.remedy, "unsupported_parameter")

    best_of = values.get("best_of")
    if best_of is not None and not is_same(best_of, values.get("n", 1)):
        raise values.refusal(
            "best_of",
            "leave it out, and use n to get several answers",
            "unsupported_parameter",
        )
    if not is_chat and "top_logprobs" in values:
        raise values.refusal("top_logprobs", "for completions use logprobs, a number")
