"""PURE: what was said in a chat, and what of it the model is told next."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hpc.login.thoughts import split


@dataclass
class Turn:
    """A question and its answer, as it came."""

    question: str
    answer: str = ""
    stopped: bool = False
    """The user ended it."""

    @property
    def said(self) -> str:
        return split(self.answer)[0]

    @property
    def thought(self) -> str:
        return split(self.answer)[1]


@dataclass
class Conversation:
    """All turns since the beginning, or the last reset; the model is told the latest of them."""

    system: str = ""
    turns: list[Turn] = field(default_factory=list)
    left_out: int = 0
    """So many of the oldest turns the model is no longer told."""

    def messages(self) -> list[dict[str, str]]:
        """For the model: without thoughts, which its template would leave out, too; with questions that have answers.

        Many a template refuses two questions after each other.
        """
        found = [{"role": "system", "content": self.system}] if self.system else []
        for turn in self.turns[self.left_out :]:
            if turn.said or turn is self.turns[-1]:
                found.append({"role": "user", "content": turn.question})
            if turn.said:
                found.append({"role": "assistant", "content": turn.said})
        return found

    def leave_out(self) -> bool:
        """Tell the model one turn less; False where only the question is left."""
        if self.left_out >= len(self.turns) - 1:
            return False
        self.left_out += 1
        return True

    def document(self) -> dict[str, Any]:
        """All of it, for a file."""
        turns = [
            {"question": t.question, "answer": t.said, "thought": t.thought, "stopped": t.stopped} for t in self.turns
        ]
        return {"system": self.system, "turns": turns}

    def text(self) -> str:
        """The same for people."""
        lines = [f"System: {self.system}\n"] if self.system else []
        for turn in self.turns:
            lines += [f"You: {turn.question}\n", f"Model: {turn.said}{' […]' if turn.stopped else ''}\n"]
        return "\n".join(lines)
