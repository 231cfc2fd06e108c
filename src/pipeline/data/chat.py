"""Messages into tokens by segments, so that what a person typed is text and what the template wrote is
control.

A chat template is rendered once for each sequence of roles, with a marker in the place of every content. That
gives the pieces between the contents; control tokens are read in those pieces only. A row is then its pieces
with the real contents between, every stretch of text between two control tokens encoded in one go, so that a
row whose contents hold no control strings gets the very ids `apply_chat_template` gives.

Control tokens are the special ones and eos, and of the other added tokens those that the template names: some
tokenizers don't mark `<|im_start|>` as special, and `<tool_response>` they hardly ever do. Of these others an
assistant may write what doesn't frame a turn (`<think>`, `<tool_call>`): in its words they are tokens. Tools and
calls are no contents with a place of their own: `tools.py` says how theirs stay letters.

What is trained in a row is what the model would have to write: everything an assistant turn holds after the
prompt that generation starts from, up to and with the stop token. Text is cut at the start of that, since
generation starts there too. The last turn of a row ends at its stop token: the newline many templates write
after it opens the next turn.

    <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\nHello<|im_end|>
    --------------------------- prompt --------------------------|-- trained --|
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from pipeline.data.messages import Message
from pipeline.data.outline import PROBE, mark, outline_of, probes
from pipeline.data.runs import Draft, Plan, Run, Slot
from pipeline.data.tokenizers import PlainText, first_line, plain_text, read_plainly
from pipeline.data.tools import breaking, check_written, for_template, has_tools, is_wordless, said_of_tools, unbroken
from pipeline.data.typed import added_by_name, hidden_in, special_pattern
from pipeline.errors import DataError, MismatchError, RowError

NO_TEMPLATE_MEND = "choose an instruction-tuned base model, or pass its tokenizer through tokenize to get ChatML"


@dataclass(frozen=True)
class Encoded:
    """One row as tokens; `is_trained` is True where a token is the assistant's own or its stop token."""

    input_ids: list[int]
    is_trained: list[bool]


class ChatEncoder:
    """Messages into tokens for one tokenizer and its chat template; made once, see `chat_encoder`."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        if not tokenizer.chat_template:
            raise MismatchError("the tokenizer has no chat template", where=where(tokenizer), mend=NO_TEMPLATE_MEND)
        self.tokenizer = tokenizer
        self.template: str | dict[str, str] = tokenizer.chat_template
        self.plans: dict[tuple[tuple[str, ...], tuple[bool, ...], bool], Plan] = {}
        self.plain: PlainText = plain_text(tokenizer)
        self.breaking = breaking(())
        turn = self.pieces(probes(("user", "assistant")), False)
        frame = "".join(self.frames())
        added = tokenizer.added_tokens_decoder
        marked = {i for i, token in added.items() if token.special or token.content == tokenizer.eos_token}
        written = set(added_by_name(tokenizer, f"{self.template}{frame}")) - marked
        self.hidden = hidden_in(tokenizer, written, frame)
        named = written - self.hidden.ids
        specials = sorted(marked | named, key=lambda i: -len(added[i].content))  # of two that fit, the longer is meant
        self.special_ids = {added[i].content: i for i in specials}
        self.special = re.compile("|".join(special_pattern(added[i]) for i in specials) or r"(?!)")
        self.breaking = breaking(self.special_ids)
        self.stop_id = self.find_stop(str(turn[-1]), marked)
        framing = {added[i].content for i in named if added[i].content in frame}
        self.assistants = read_plainly(tokenizer, framing) if framing else self.plain
        self.everyones = read_plainly(tokenizer, {added[i].content for i in named}) if named else self.plain

    def frames(self) -> Iterator[str]:
        """What the template writes before anybody's words but an assistant's, and after an assistant's last ones."""
        for roles in (
            ("user", "assistant"),
            ("system", "user", "assistant"),
            ("user", "assistant", "tool", "assistant"),
        ):
            try:
                pieces = self.pieces(probes(roles), False)
            except DataError:  # it has no such role
                continue
            for text, slot in zip(pieces[::2], pieces[1::2], strict=False):
                if isinstance(slot, Slot) and roles[slot.index] != "assistant":
                    yield str(text)
            yield str(pieces[-1])

    def find_stop(self, text: str, marked: Collection[int]) -> int:
        """The first special token in what the template writes after an assistant's content; one not marked as special
        only where there is no other."""
        found = [self.id_of(each) for each in self.special.finditer(text)]
        if not found:
            raise MismatchError(
                "the chat template writes no special token after an assistant's turn, so nothing would "
                "teach the model to stop",
                where=where(self.tokenizer),
                mend="use a chat template that ends an assistant's turn with a special token, such as eos",
            )
        return next((token for token in found if token in marked), found[0])

    def id_of(self, found: re.Match[str]) -> int:
        """The special token that `self.special` has found."""
        assert found.lastindex is not None
        return int(self.special_ids[found[found.lastindex]])

    def encode(self, messages: list[Message], add_generation_prompt: bool) -> Encoded:
        """The row of `messages`; RowError where the template can't render them or rewrites a content."""
        try:
            return self.encode_row(messages, add_generation_prompt)
        except DataError as error:
            place = f"{error.where}, {beginning(messages)}"
            named = RowError(error.what, where=place, mend=error.mend)
            named.messages = messages
            raise named from error

    def encode_row(self, messages: list[Message], add_generation_prompt: bool) -> Encoded:
        """The row of `messages`; DataError likewise, of the tokenizer alone."""
        rendered = self.render(messages, add_generation_prompt)
        if self.hidden.ids:
            self.check_typed_in_tools(messages)
        roles = tuple(message["role"] for message in messages)
        trained = tuple(counts(message) for message in messages)
        plan = None if has_tools(messages) else self.plans.get((roles, trained, add_generation_prompt))
        if plan is None:
            plan = self.plan(outline_of(messages), trained, add_generation_prompt)
        if not has_tools(messages):  # a row's own calls are a part of its plan
            self.plans[roles, trained, add_generation_prompt] = plan
        if rendered != "".join(part if isinstance(part, str) else part.text(messages) for part in plan.rendered):
            raise DataError(
                "the chat template rewrites a content of this row instead of writing it down",
                where=where(self.tokenizer),
                mend="take out what the template treats specially (such as </think>), or the row",
            )
        input_ids: list[int] = []
        is_trained: list[bool] = []
        for run in plan.runs:
            ids: Sequence[int] = run.ids
            if run.parts:
                ids = self.run_ids(run, messages)
            input_ids.extend(ids)
            is_trained.extend([run.is_trained] * len(ids))
        return Encoded(input_ids, is_trained)

    def run_ids(self, run: Run, messages: list[Message]) -> list[int]:
        """The ids of a run of text, its slots filled in; each read apart where one of them types a control token that
        the tokenizer looks for in normalised text."""
        texts = [part if isinstance(part, str) else part.text(messages) for part in run.parts]
        if not self.hidden.in_run(run, messages):
            return self.text_ids("".join(texts), run)
        ids: list[int] = []
        for place, (part, text) in enumerate(zip(run.parts, texts, strict=True)):
            is_prefixed = run.is_prefixed and place == 0
            if isinstance(part, Slot):
                ids += self.hidden.letters(text, run, is_prefixed=is_prefixed)
            else:
                ids += self.text_ids(text, replace(run, is_prefixed=is_prefixed))
        return ids

    def text_ids(self, text: str, run: Run) -> list[int]:
        """The ids of a run's text."""
        plain = self.assistants if run.is_assistants else self.everyones
        backend = plain.prefixed if run.is_prefixed else plain.bare
        ids: list[int] = backend.encode(text, add_special_tokens=False).ids
        return ids

    def render(self, messages: list[Message], add_generation_prompt: bool) -> str:
        """The template's own text for `messages`; DataError where it raises."""
        given, tools = for_template(messages, self.breaking)
        try:
            text: str = self.tokenizer.apply_chat_template(
                given, tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except (TemplateError, TypeError, AttributeError, KeyError) as error:
            roles = " ".join(message["role"] for message in messages)
            raise DataError(
                f"the chat template cannot render the roles {roles}: {first_line(error)}",
                where=where(self.tokenizer),
                mend="change the row's roles, or use a tokenizer whose template has them",
            ) from error
        return text

    def marked(self, outline: list[Message], add_generation_prompt: bool) -> str:
        """The template's text for an outline, with a marker, too, where a turn of calls alone begins: where the model
        would begin to write it."""
        text = self.render(outline, add_generation_prompt)
        starts = {i: self.render(outline[:i], True) for i, message in enumerate(outline) if is_wordless(message)}
        for index, start in reversed(starts.items()):
            if not text.startswith(start):
                raise DataError(
                    f"the chat template does not begin the tool calls of message {index + 1} with its generation "
                    "prompt, so nothing says what of them is trained",
                    where=where(self.tokenizer),
                    mend="use a chat template whose turns begin with its own generation prompt",
                )
            text = f"{start}\ue000{index}\ue001{text[len(start) :]}"
        return text

    def pieces(self, outline: list[Message], add_generation_prompt: bool) -> list[str | Slot]:
        """What the template renders for an outline: text and slots by turns, text first and last."""
        split = PROBE.split(self.marked(outline, add_generation_prompt))
        pieces: list[str | Slot] = [split[0]]
        for left, index, right, text in zip(split[1::4], split[2::4], split[3::4], split[4::4], strict=True):
            pieces += [Slot(int(index), not left, not right, left == right == "\\u000b"), text]
        seen = sorted(piece.index for piece in pieces if isinstance(piece, Slot))
        for index, message in enumerate(outline):
            if seen.count(index) != 1:
                raise DataError(
                    f"the chat template writes the content of message {index + 1} (role {message['role']}) "
                    f"{seen.count(index)} times instead of once",
                    where=where(self.tokenizer),
                    mend="change the row's roles, or use a tokenizer whose template has them",
                )
        return pieces

    def plan(self, outline: list[Message], trained: tuple[bool, ...], add_generation_prompt: bool) -> Plan:
        """The runs of a row of this outline; `trained`: whether each message is."""
        roles = tuple(message["role"] for message in outline)
        pieces = self.pieces(outline, add_generation_prompt)
        if has_tools(outline):
            self.check_tools(outline, pieces)
        draft = Draft()
        for place in range(0, len(pieces), 2):
            before = pieces[place - 1] if place else None
            after = pieces[place + 1] if place + 1 < len(pieces) else None
            text = str(pieces[place])
            if isinstance(before, Slot) and roles[before.index] == "assistant":
                text = self.close_turn(draft, text, roles, trained[before.index])
                if before.index == len(roles) - 1 and after is None and not add_generation_prompt:
                    break
            trained_from = len(text)
            if isinstance(after, Slot) and roles[after.index] == "assistant":
                trained_from = self.generation_starts(outline, pieces, place, len(str(pieces[place])) - len(text))
            self.add_text(draft, text[:trained_from], False)
            if isinstance(after, Slot):
                if roles[after.index] == "assistant":
                    draft.close()  # cut where generation starts, trained or not: a mask never changes the tokens
                self.add_text(
                    draft, text[trained_from:], trained[after.index], is_turns=roles[after.index] == "assistant"
                )
                if not is_wordless(outline[after.index]):
                    draft.text(after, trained[after.index])
        draft.close()
        return Plan(self.finished(draft.runs, roles), tuple(pieces))

    def close_turn(self, draft: Draft, text: str, roles: tuple[str, ...], is_trained: bool) -> str:
        """Adds what ends an assistant's turn, the stop token last; returns the text after it."""
        for found in self.special.finditer(text):
            if self.id_of(found) == self.stop_id:
                self.add_text(draft, text[: found.end()], is_trained, is_turns=True)
                return text[found.end() :]
        raise MismatchError(
            f"the chat template ends an assistant's turn in {' '.join(roles)} without its stop token "
            f"{self.tokenizer.convert_ids_to_tokens(self.stop_id)}",
            where=where(self.tokenizer),
            mend="use a chat template that ends every assistant's turn alike, or rows with one answer",
        )

    def check_tools(self, outline: list[Message], pieces: list[str | Slot]) -> None:
        """DataError where the template leaves out a tool, or a part of a call."""
        around = {
            piece.index: f"{pieces[place - 1]}{pieces[place + 1]}"
            for place, piece in enumerate(pieces)
            if isinstance(piece, Slot)
        }
        check_written(outline, "".join(map(str, pieces[::2])), around, where(self.tokenizer))

    def check_typed_in_tools(self, messages: list[Message]) -> None:
        """DataError where tools or calls hold a control token that the tokenizer looks for in normalised text."""
        for said in said_of_tools(messages):
            if self.hidden.is_typed(said, is_assistants=False):
                raise DataError(
                    f"the row's tools hold {said[:40]!r}, which the tokenizer makes a control token of",
                    where=where(self.tokenizer),
                    mend="take it out, or let tokenizer.json say `normalized: false` of its added tokens",
                )

    def generation_starts(self, outline: list[Message], pieces: list[str | Slot], place: int, taken: int) -> int:
        """Where the model begins to write, in what is left of the text `pieces[place]` after `taken` characters.

        That is the end of the prompt that generation would start from. In the middle of a conversation a
        template may render an earlier turn otherwise than it once stood (thoughts left out): there it is the
        content's start. For the last turn that would train on another prompt than the one in use, so it is
        refused.
        """
        slot = pieces[place + 1]
        assert isinstance(slot, Slot)
        text = str(pieces[place])
        head = "".join(piece if isinstance(piece, str) else mark(piece) for piece in pieces[: place + 1])
        prompt = ""
        if slot.index > 0:
            prompt = PROBE.sub(lambda found: f"\ue000{found.group(2)}\ue001", self.marked(outline[: slot.index], True))
        start = len(text) - (len(head) - len(prompt))
        if head.startswith(prompt) and prompt and start >= taken:
            return start - taken
        if slot.index == len(outline) - 1 and slot.index > 0:
            raise MismatchError(
                "the chat template's generation prompt is not how it begins an assistant's turn, so a model "
                "would be trained on one prompt and used with another",
                where=where(self.tokenizer),
                mend="use a chat template whose turns begin with its own generation prompt",
            )
        return len(text) - taken

    def add_text(self, draft: Draft, text: str, is_trained: bool, *, is_turns: bool = False) -> None:
        """Adds a piece the template wrote, its special tokens as tokens. In an assistant's turn what was broken stands
        apart from its words, in which some control strings are tokens."""
        end = 0
        for found in (*self.special.finditer(text), None):
            part = text[end : found.start() if found else len(text)]
            if part:
                is_apart = is_turns and unbroken(part) != part
                if is_apart:
                    draft.close()
                draft.text(unbroken(part), is_trained)
                if is_apart:
                    draft.close()
            if found:
                draft.special(self.id_of(found), is_trained)
                end = found.end()

    def finished(self, runs: list[Run], roles: tuple[str, ...]) -> tuple[Run, ...]:
        """The runs with their prefixes and speakers decided, those without slots encoded once and for all."""
        done: list[Run] = []
        is_section = True
        for i, run in enumerate(runs):
            if run.parts:
                is_prefixed = (self.plain.prefix == "section" and is_section) or (
                    self.plain.prefix == "first" and i == 0
                )
                speakers = {roles[part.index] for part in run.parts if isinstance(part, Slot)}
                assert "assistant" not in speakers or len(speakers) == 1, "nobody shares a run with an assistant"
                ready = replace(run, is_prefixed=is_prefixed, is_assistants=speakers == {"assistant"})
                if not speakers:
                    text = "".join(str(part) for part in run.parts)
                    ready = Run(run.is_trained, ids=tuple(self.text_ids(text, ready)))
                done.append(ready)
            else:
                done.append(run)
            is_section = not run.parts
        return tuple(done)


def counts(message: Message) -> bool:
    """Whether a message is trained: the assistant's, and not one that the row leaves out of the loss (`weight: 0`)."""
    return message["role"] == "assistant" and message.get("weight") != "0"


def beginning(messages: list[Message]) -> str:
    """A row by its first words, for an error."""
    return f"the row that begins {messages[0]['content'][:60]!r}" if messages else "an empty row"


def where(tokenizer: PreTrainedTokenizerFast) -> str:
    """The name of a tokenizer in an error."""
    return f"tokenizer {tokenizer.name_or_path}" if tokenizer.name_or_path else "chat template"


_encoders: weakref.WeakKeyDictionary[PreTrainedTokenizerFast, ChatEncoder] = weakref.WeakKeyDictionary()


def chat_encoder(tokenizer: PreTrainedTokenizerFast) -> ChatEncoder:
    """The encoder of a tokenizer, made on first use and again when its template or its tokens change."""
    encoder = _encoders.get(tokenizer)
    if encoder is None or encoder.template != tokenizer.chat_template or encoder.plain is not plain_text(tokenizer):
        encoder = _encoders[tokenizer] = ChatEncoder(tokenizer)
    return encoder


def encode_messages(
    tokenizer: PreTrainedTokenizerFast, messages: list[Message], *, add_generation_prompt: bool = False
) -> Encoded:
    """Messages as ids, with what is trained in them; a row that ends with an assistant ends at its stop
    token.

    Raises RowError where the template can't render the roles or rewrites a content, MismatchError where the
    tokenizer has no template or one that trains no stop token.
    """
    return chat_encoder(tokenizer).encode(messages, add_generation_prompt)


def encode_prompt(tokenizer: PreTrainedTokenizerFast, messages: list[Message]) -> list[int]:
    """Messages as ids, up to where the assistant begins to write."""
    return chat_encoder(tokenizer).encode(messages, True).input_ids


def stop_token_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """The token that ends an assistant's turn, as the chat template itself writes it (not always eos)."""
    return chat_encoder(tokenizer).stop_id
