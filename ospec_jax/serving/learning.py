# SPDX-License-Identifier: Apache-2.0
"""What a service learns: its versions, its checkpoints, and what is done to them.

All of it is for the thread that decodes, between two steps.
"""

import contextlib
import dataclasses
import logging
import tempfile
import time
from collections import deque
from collections.abc import Generator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from ospec_jax.config import ConfigError
from ospec_jax.data.prompts import Prompt
from ospec_jax.decoding.request import Completion, Request
from ospec_jax.decoding.stats import DecodingStats
from ospec_jax.learners.deltas import count_deltas
from ospec_jax.loading import load_draft
from ospec_jax.online.trainer import UpdateReport
from ospec_jax.serving.settings import ServiceConfig
from ospec_jax.session.session import Session
from ospec_jax.storage.checkpoint import unreadable_steps
from ospec_jax.types import Draft

_LOG = logging.getLogger(__name__)
_NUM_KEPT = 4
"""Versions of the draft to go back to, that of the start among them."""
_NUM_REPORTS = 16
"""Newest updates by which a draft that waits is judged. Chosen, not measured."""


class _Kept(NamedTuple):
    """A version to go back to; its arrays are the host's."""

    version: int
    draft: Draft


@dataclasses.dataclass
class _Counts:
    """Since the start."""

    num_answers: int = 0
    num_taught: int = 0
    num_updates: int = 0
    seconds: float = 0.0


class Learning:
    """The draft of a session as a service serves it, and what becomes of it.

    Attributes:
      version: Of the served draft.
      draft_status: What others may ask of it, for whom its state is out of reach.
    """

    def __init__(self, session: Session, config: ServiceConfig):
        self.version = session.version
        self.draft_status: dict[str, Any] = {}
        self._session = session
        self._config = config
        self._counts = _Counts()
        self._paused_for: str | None = None
        self._since_swap = DecodingStats()
        self._newest = self._learned_version
        self._kept: deque[_Kept] = deque()
        self._own_drafts: dict[str, int] | None = None
        self._save_error: str | None = None
        self._saved_at = time.monotonic()
        self._saved_answers = 0

    def start(self) -> None:
        """Keeps the version that nothing was learned by yet."""
        self._keep_version()
        self._note()
        if self._config.checkpoint is None or self._session.meta is None:
            return

        # What the first checkpoint compiles shall keep nobody waiting.
        try:
            with tempfile.TemporaryDirectory() as place:
                folder = Path(place) / "rehearsal"
                self._session.save(folder, self._config.keeps_traffic)
        except Exception as error:
            self._note_failure(error)

    def status(self) -> dict[str, Any]:
        """How learning goes, as JSON."""
        counts = self._counts
        practice = self._session.practice
        return {
            "learner": self._session.learner and self._session.learner.name,
            "is_on": self._paused_for is None,
            "paused_for": self._paused_for,
            "num_updates": counts.num_updates,
            "num_answers": counts.num_taught,
            "seconds": counts.seconds,
            "practice": practice and dataclasses.asdict(practice.counts),
            "own_drafts": self._own_drafts,
            "save_error": self._save_error,
        }

    @property
    def seconds_until_due(self) -> float:
        """Until the next checkpoint; 0 and less is now."""
        due = self._saved_at + self._config.checkpoint_seconds
        return due - time.monotonic()

    def take_in(
        self,
        prompt: Prompt,
        completion: Completion,
        text: str,
        can_teach: bool,
        is_shared: bool,
    ) -> None:
        """Learns from an answer.

        Args:
          text: The answer's.
          is_shared: What all are served with may learn from it, too.
        """
        can_teach &= self._paused_for is None
        counts = self._counts
        with self._safely():
            result = self._session.take_in(
                prompt, completion, text, can_teach, is_shared, in_slices=True
            )
            counts.seconds += result.learning_seconds

        self._count_updates()
        counts.num_taught += can_teach
        counts.num_answers += 1
        self._note()

    @property
    def is_updating(self) -> bool:
        """Whether an update is under way, of which slices are left."""
        return self._session.is_updating

    def go_on(self) -> None:
        """Runs a slice of the update under way."""
        with self._safely():
            self._counts.seconds += self._session.go_on()

        if not self.is_updating:
            self._count_updates()
            self._note(is_changed=True)

    def _finish(self) -> None:
        """Runs all slices that are left, before something else is done to the draft."""
        while self.is_updating:
            self.go_on()

    def _count_updates(self) -> None:
        self._counts.num_updates += max(self._learned_version - self._newest, 0)

    def next_exercise(self) -> Request | None:
        """What the target may write for itself, while nobody asks; None for nothing."""
        practice = self._session.practice
        if practice is None or self._paused_for is not None:
            return None

        return practice.next_request()

    def practise(self, completion: Completion) -> None:
        """Goes on with an exercise, and learns from it once it is complete."""
        exercise = None
        can_teach = self._paused_for is None
        with self._safely():
            exercise = self._session.take_practice(
                completion, can_teach, in_slices=True
            )

        if can_teach and exercise is not None:
            self._count_updates()
            self._counts.num_answers += 1
        self._note()

    @contextlib.contextmanager
    def _safely(self) -> Generator[None]:
        """Pauses learning where it fails, and serves what was kept."""
        try:
            yield
        except Exception:
            # An update that failed may have used up what is served.
            _LOG.exception("learning has failed, and is paused")
            self._paused_for = "failed"
            session = self._session
            if session.is_promoted_by_hand and session.draft is not None:
                # Of what is served nothing was used up.
                session.begin_again(session.draft)
            elif self._kept:
                session.begin_again(self._kept[-1].draft)

    def count(self, stats: DecodingStats) -> None:
        """Counts an answer of the served version, before it is learned from."""
        self._since_swap = self._since_swap + stats
        self._note()

    def _note(self, is_changed: bool = False) -> None:
        """Keeps what others may ask of the draft.

        Args:
          is_changed: By an administrator: to be saved, though nothing was answered.
        """
        if is_changed:
            self._saved_answers = -1
        version = self._session.version
        meta = self._session.meta
        stats = self._since_swap
        if version != self.version:
            self._since_swap = DecodingStats()
        self.version = version
        self._newest = self._learned_version
        traffic = self._session.state.traffic
        if traffic is not None and traffic.deltas is not None:
            self._own_drafts = count_deltas(traffic.deltas)
        self.draft_status = {
            "family": None if meta is None else meta.family,
            "version": version,
            "kept_versions": [kept.version for kept in self._kept],
            "acceptance_length": stats.mean_acceptance_length,
            "num_steps_since_swap": stats.num_drafts,
            "waiting": self._waiting_status(),
        }

    @property
    def _learned_version(self) -> int:
        """Of the draft that learning goes on with, which may wait to be served."""
        return self._session.version + self._session.num_waiting

    def _waiting_status(self) -> dict[str, Any] | None:
        """What waits to be promoted; None where nobody has to say so."""
        if not self._session.is_promoted_by_hand:
            return None

        count = self._session.num_waiting
        # An update says of the draft before it how it agrees with the target.
        reports = self._session.reports[-min(count, _NUM_REPORTS) :] if count else []
        found = [_agreement_of(report) for report in reports]
        known = [one for one in found if one is not None]
        agreement = sum(known) / len(known) if known else None
        return {"num_updates": count, "agreement": agreement}

    def save(self, num_kept: int = 2) -> Path | None:
        """Writes a checkpoint, if there is a folder for it and something new.

        Args:
          num_kept: Steps that stay in the folder.
        """
        self._saved_at = time.monotonic()
        self._keep_version()
        folder = self._config.checkpoint
        if folder is None or self._session.meta is None:
            return None
        if self._counts.num_answers == self._saved_answers:
            return None

        place = self._session.save(folder, self._config.keeps_traffic, num_kept)
        self._saved_answers = self._counts.num_answers
        return place

    def try_to_save(self, num_kept: int = 2) -> bool:
        """Saves; where that fails, serving goes on."""
        try:
            self.save(num_kept)
        except Exception as error:
            self._note_failure(error)
            return False

        self._save_error = None
        return True

    def _note_failure(self, error: Exception) -> None:
        self._save_error = f"{type(error).__name__}: {error}"[:300]
        _LOG.error("the checkpoint could not be written", exc_info=error)

    def _keep_version(self) -> None:
        """Puts the served draft aside, to go back to."""
        newest = self._kept[-1].version if self._kept else None
        if self._session.draft is not None and newest != self.version:
            # On the host: learning overwrites what is on the device.
            draft = jax.device_get(self._session.draft)
            first, *rest = [*self._kept, _Kept(self.version, draft)]
            # The first one, which nothing here was learned by, stays.
            self._kept = deque([first, *rest[1 - _NUM_KEPT :]])

    # What an administrator may ask for.

    def checkpoint(self) -> dict[str, Any]:
        """Writes one.

        Raises:
          ConfigError: There is no folder for them.
        """
        if self._config.checkpoint is None:
            raise ConfigError("no folder for checkpoints was given: use --checkpoint")

        place = self.save()
        return {"saved": place and place.name, "version": self.version}

    def pause(self, reason: str = "paused") -> dict[str, Any]:
        """Learns nothing more; an update that is under way is finished."""
        self._finish()
        self._paused_for = reason
        return {"paused_for": reason, "version": self.version}

    def resume(self) -> dict[str, Any]:
        """Learns on."""
        self._paused_for = None
        return {"paused_for": None, "version": self.version}

    def promote(self) -> dict[str, Any]:
        """Serves what has been learned, as a new version.

        Raises:
          ConfigError: The draft is pinned, what is learned is served at once, or
            nothing waits.
        """
        if self._paused_for == "pinned":
            raise ConfigError("the draft is pinned; unpin it before you promote")

        self._finish()
        # What is served now, to go back to, and what will be: it must be there still
        # when much has been learned behind it.
        self._keep_version()
        count = self._session.num_waiting
        self._session.promote()
        self._note(is_changed=True)
        self._keep_version()
        self._note()
        return {"promoted_updates": count, "version": self.version}

    def roll_back(self, version: int | None = None) -> dict[str, Any]:
        """Serves an earlier version again, by default the newest that was kept.

        Raises:
          ConfigError: There is none.
        """
        earlier = [kept for kept in self._kept if kept.version != self.version]
        found = [kept for kept in earlier if version in (None, kept.version)]
        if not found:
            known = ", ".join(str(kept.version) for kept in earlier) or "none"
            which = "" if version is None else f" {version}"
            raise ConfigError(f"no earlier version{which} is kept; there are: {known}")

        self._session.begin_again(found[-1].draft)
        self._note(is_changed=True)
        return {"restored": found[-1].version, "version": self.version}

    def load(self, name: str) -> dict[str, Any]:
        """Serves another draft of the same architecture, by name.

        Raises:
          ConfigError: There is no folder of drafts, or the name is none.
          CheckpointError: There is no such draft, or it does not fit.
        """
        folder = self._config.drafts
        if folder is None:
            raise ConfigError("no folder of drafts was given: use --drafts")
        if not name or Path(name).name != name or name.startswith("."):
            raise ConfigError(f"{name!r} is no name of a folder in {folder.name}")

        loaded = load_draft(folder / name, self._session.target)
        self._session.begin_again(loaded.draft)
        self._note(is_changed=True)
        return {"loaded": name, "version": self.version}

    def forget(
        self, scope: str | None = None, is_draft_too: bool = False
    ) -> dict[str, Any]:
        """Drops kept traffic, and with `is_draft_too` all that was learned.

        Steps of the checkpoint that may hold the traffic are replaced.

        Args:
          scope: A key's name, with its tenants, or `key/tenant`; None is everybody.

        Raises:
          ConfigError: The scope has no name.
        """
        known = self._session.scopes.known
        gone = self._session.forget_traffic(scope)
        stays = ["how often n-grams were right, as figures without text"]
        has_taught = scope is None or any(one.has_taught for one in gone)
        if is_draft_too:
            self._session.begin_again(self._kept[0].draft)
            stays.append("what the draft had learned before this server was started")
            self._kept = deque([self._kept[0]])
        elif has_taught:
            waiting = ", those that wait" if self._session.is_promoted_by_hand else ""
            stays.append(
                f"the draft's weights{waiting} and their earlier versions, which have "
                f"learned from it and are shared by all"
            )
        elif gone:
            stays.append("nothing in the draft's weights since this was first heard of")
        else:
            # It never asked, or was forgotten before: nobody can say if it shared.
            stays.append(
                "whatever the draft's weights learned from it earlier, for it is not "
                "known now"
            )

        self._note(is_changed=True)
        stays += self._replace_checkpoint()
        names = "all scopes" if scope is None else scope
        return {
            "forgotten": f"n-grams, windows, caches and own drafts of {names}",
            "scopes": [one.name for one in (known if scope is None else gone)],
            "stays": "; ".join(stays),
        }

    def _replace_checkpoint(self) -> list[str]:
        """Writes what there is now in place of all steps; says what stays."""
        folder = self._config.checkpoint
        stays = ["copies of checkpoints elsewhere"]
        if folder is None:
            return stays

        if not self.try_to_save(num_kept=1):
            stays.append(f"steps in {folder.name}, for they could not be written anew")
        stays += [
            f"{one.name}, which was set aside" for one in unreadable_steps(folder)
        ]
        return stays


def _agreement_of(report: UpdateReport) -> float | None:
    """Share of positions at which the draft's likeliest token was the target's.

    Of a whole draft at its first depth; None where the learner does not know it.
    """
    agreement = report.info.agreement
    return None if agreement is None else float(np.ravel(agreement)[0])
