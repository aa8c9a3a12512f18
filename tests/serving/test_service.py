# SPDX-License-Identifier: Apache-2.0
"""One thread serves whoever asks; every answer is the one that the session gives."""

import dataclasses
import queue
import threading
import time

import numpy as np
import pytest
from drafted import random_head
from served import wait_for

from ospec_jax import LearnerConfig, Session, TreeConfig, load_draft
from ospec_jax.config import ConfigError, SamplingConfig
from ospec_jax.control.base import Controller
from ospec_jax.data.prompts import parse_prompt
from ospec_jax.decoding.request import PromptTooLongError
from ospec_jax.learners import deltas
from ospec_jax.loading import pool_draft
from ospec_jax.online import scopes
from ospec_jax.serving import service as service_module
from ospec_jax.serving.asks import Ask, ChoiceEnd, Ended, Failed, OverloadedError, Piece
from ospec_jax.serving.service import Service
from ospec_jax.serving.settings import ServiceConfig
from ospec_jax.storage import checkpoint
from ospec_jax.testing import tiny_target

pytestmark = pytest.mark.filterwarnings("ignore:the mean acceptance length")

PROMPTS = [f"Add {i} to {i * i}." for i in range(12)]
NEW_TOKENS = 24
# What steps are made of is no matter here, so there is less to compile.
HOW: dict = dict(tree=TreeConfig(num_steps=2), num_predicted_tokens=0)


@pytest.fixture(scope="module")
def target():
    return tiny_target()


@pytest.fixture(scope="module")
def draft(target):
    return random_head(target)


@pytest.fixture(scope="module")
def plain(target):
    results = Session(target, batch_size=3).generate(PROMPTS, NEW_TOKENS)
    return {r.prompt.text: r.text for r in results}


def session_of(target, draft):
    # Versions are counted here: each answer is to make one.
    learner = LearnerConfig("head", head_every=1)
    return Session(target, draft, learner=learner, batch_size=2, **HOW)


@pytest.fixture
def asked_greedily(monkeypatch):
    """A service of this test compiles for nothing but greedy answers."""
    monkeypatch.setattr(service_module, "KINDS", ("greedy",))


@pytest.fixture(scope="module")
def service(target, draft):
    config = ServiceConfig("tiny", max_model_len=240, max_waiting=40)
    service = Service(session_of(target, draft), config)
    service.start()
    service.wait_until_ready()
    yield service
    service.stop()
    assert not service.is_alive


def ask_of(text, **values):
    seed = values.pop("seed", None)
    prompt = parse_prompt(
        {"prompt": text} | ({} if seed is None else {"seed": seed}), "a"
    )
    return Ask(prompt, **({"max_new_tokens": NEW_TOKENS} | values))


class Heard:
    """What one request hears."""

    def __init__(self, service, ask):
        self.events = queue.SimpleQueue()
        self.ticket = service.submit(service.prepare(ask), self.events.put)

    def all(self):
        found = []
        while not found or not isinstance(found[-1], Ended | Failed):
            found.append(self.events.get(timeout=60))
        return found

    def texts(self):
        texts = {}
        for event in self.all():
            assert not isinstance(event, Failed), event.error
            if isinstance(event, Piece | ChoiceEnd):
                texts[event.choice] = texts.get(event.choice, "") + event.text
        return texts


def test_many_at_once_are_answered_as_by_the_target_alone(service, plain):
    heard = [Heard(service, ask_of(text)) for text in PROMPTS]
    assert {t: h.texts()[0] for t, h in zip(PROMPTS, heard, strict=True)} == plain
    # And what was learned meanwhile is served now.
    service.call(lambda: None)
    assert service.version > 0
    assert Heard(service, ask_of(PROMPTS[0])).texts()[0] == plain[PROMPTS[0]]


@dataclasses.dataclass(frozen=True)
class NumSteps:
    """What a rule that takes turns remembers."""

    number: int = 0


def in_turns(actions):
    """Plain steps until the draft rests, and some that draft, in turns."""
    plain, drafting = actions
    return Controller(
        actions=actions,
        init=lambda num_rows: NumSteps(),
        choose=lambda state, rows: plain if state.number % 20 < 14 else drafting,
        observe=lambda state, action, outcome: NumSteps(state.number + 1),
    )


def test_a_draft_that_rests_at_times_compiles_nothing_anew(
    target, draft, plain, asked_greedily
):
    tree = TreeConfig.auto((0, 3))
    session = Session(
        target, draft, tree=tree, controller=in_turns, batch_size=2,
        num_predicted_tokens=0,
    )  # fmt: skip
    service = Service(session, ServiceConfig("tiny", 240))
    service.start()
    try:
        heard = [Heard(service, ask_of(text)) for text in PROMPTS[:6]]
        answers = [h.all() for h in heard]
        drafted = sum(events[-1].stats.num_draft_tokens for events in answers)
        assert drafted > 0
        for text, events in zip(PROMPTS, answers, strict=False):
            pieces = [e.text for e in events if isinstance(e, Piece | ChoiceEnd)]
            assert "".join(pieces) == plain[text]
        assert service.status()["totals"]["num_compiles_after_warm_up"] == 0
    finally:
        service.stop()


def test_nobody_who_is_answered_waits_for_learning(target, draft, monkeypatch):
    session = session_of(target, draft)
    take_in = session.take_in
    seen = []

    def watch(*args, **named):
        seen.append(service.status()["queue"]["num_running"])
        return take_in(*args, **named)

    monkeypatch.setattr(session, "take_in", watch)
    service = Service(session, ServiceConfig("tiny", 240))
    service.start()
    try:
        long = Heard(service, ask_of("Count.", max_new_tokens=200))
        for text in PROMPTS[:4]:
            Heard(service, ask_of(text)).all()
        assert not seen
        long.all()
        service.call(lambda: None)
        assert seen == [0] * 5
        assert service.status()["learning"]["num_answers"] == 5
    finally:
        service.stop()


@pytest.mark.parametrize(
    "law",
    [
        SamplingConfig(1.0),
        SamplingConfig(0.3),
        SamplingConfig(0.8, top_p=0.95),
        SamplingConfig(1.0, top_k=20),
        SamplingConfig(1.3, min_p=0.1),
    ],
)
def test_no_answer_of_a_usual_law_is_learned_from_in_a_new_program(service, law):
    compiled = lambda: service.status()["totals"]["num_compiles_after_warm_up"]
    before = compiled()
    Heard(service, ask_of(PROMPTS[0], sampling=law)).all()
    service.call(lambda: None)
    assert compiled() == before


def test_a_number_goes_to_a_new_scope_when_its_answers_are_learned_from(
    target, draft, monkeypatch
):
    monkeypatch.setattr(scopes, "MAX_SCOPES", 2)
    session = session_of(target, draft)
    take_in = session.take_in
    seen = []

    def watch(prompt, completion, *args, **named):
        number = completion.request.scope
        name = next(one.name for one in session.scopes.known if one.number == number)
        seen.append((session.text_of(completion), name))
        return take_in(prompt, completion, *args, **named)

    monkeypatch.setattr(session, "take_in", watch)
    service = Service(session, ServiceConfig("tiny", 240))
    service.start()
    try:
        long = Heard(service, ask_of("Count.", max_new_tokens=200, scope="long"))
        told = {
            Heard(service, ask_of(text, scope=scope)).texts()[0]: scope
            for scope, text in zip("abc", PROMPTS, strict=False)
        }
        told[long.texts()[0]] = "long"
        service.call(lambda: None)
    finally:
        service.stop()

    assert dict(seen) == told
    assert len(told) == 4


def test_askers_on_many_threads_hear_their_own_answers(service, plain):
    found = {}

    def ask(text):
        found[text] = Heard(service, ask_of(text)).texts()[0]

    threads = [threading.Thread(target=ask, args=(text,)) for text in PROMPTS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert found == plain


def test_an_answer_is_told_piece_by_piece_and_counted(service):
    ask = ask_of("Count.")
    prepared = service.prepare(ask)
    events = Heard(service, ask).all()
    *pieces, end, ended = events
    tokens = [token for piece in pieces for token in piece.tokens]
    assert all(isinstance(piece, Piece) for piece in pieces)
    assert isinstance(end, ChoiceEnd)
    assert end.finish_reason == "length"
    assert ended.usage.prompt == prepared.num_prompt_tokens
    assert ended.usage.completion == len(tokens) == NEW_TOKENS
    num_drafted = sum(token.is_drafted for token in tokens)
    assert num_drafted == ended.stats.num_accepted_tokens
    assert 0 <= ended.queue_seconds <= ended.first_token_seconds <= ended.seconds


@pytest.mark.usefixtures("asked_greedily")
def test_a_pool_s_service_tells_which_member_drafted(target, plain):
    members = [load_draft(name, target) for name in ("suffix", "ngram")]
    pool = pool_draft(members, target)
    session = Session(target, pool, controller="fixed:1", **HOW)
    service = Service(session, ServiceConfig("tiny", 240))
    service.start()
    try:
        *pieces, _, _ = Heard(service, ask_of(PROMPTS[0])).all()
    finally:
        service.stop()

    assert "".join(piece.text for piece in pieces) == plain[PROMPTS[0]]
    # The first token comes with the prompt.
    assert [piece.drafter for piece in pieces] == [None, *[1] * (len(pieces) - 1)]


def test_choices_differ_and_a_seed_repeats_them(service):
    hot = SamplingConfig(temperature=1.0)
    ask = ask_of("Say.", sampling=hot, num_choices=3, seed=7)
    first = Heard(service, ask).texts()
    assert sorted(first) == [0, 1, 2]
    assert len(set(first.values())) == 3
    free = [ask_of("Say.", sampling=hot) for _ in range(2)]
    assert len({Heard(service, ask).texts()[0] for ask in free}) == 2


def test_log_probabilities_and_biases_come_with_neighbours_that_have_none(
    service, plain
):
    compiled = lambda: service.status()["totals"]["num_compiles_after_warm_up"]
    before = compiled()
    others = [Heard(service, ask_of(text)) for text in PROMPTS[:3]]
    told = Heard(service, ask_of(PROMPTS[0], num_log_probs=3)).all()
    tokens = [t for e in told if isinstance(e, Piece) for t in e.tokens]
    assert tokens
    for token in tokens:
        # A greedy token is the likeliest of all.
        assert token.alternatives[0] == (token.id, token.log_prob)
        assert len(token.alternatives) == 3
    bias = SamplingConfig(logit_bias=((70, 100.0),))
    biased = Heard(service, ask_of(PROMPTS[0], sampling=bias)).texts()[0]
    assert len(set(biased)) == 1
    slow = Heard(service, ask_of(PROMPTS[0], can_speculate=False)).all()
    assert slow[-1].stats.num_draft_tokens == 0
    assert [h.texts()[0] for h in others] == [plain[text] for text in PROMPTS[:3]]
    assert compiled() == before


def test_a_stop_string_ends_the_text_before_it(service, plain):
    asked, whole = max(plain.items(), key=lambda pair: len(pair[1]))
    stop = whole[5:8]
    texts = Heard(service, ask_of(asked, stop=(stop,))).texts()
    assert texts[0] == whole[: whole.index(stop)]
    with pytest.raises(ConfigError, match="not empty"):
        service.prepare(ask_of(asked, stop=("",)))


def test_who_goes_hears_no_more_and_frees_the_row(service, plain):
    gone = Heard(service, ask_of("Go on and on.", max_new_tokens=200))
    gone.events.get(timeout=60)
    gone.ticket.cancel()
    assert Heard(service, ask_of(PROMPTS[0])).texts()[0] == plain[PROMPTS[0]]
    left = []
    while not gone.events.empty():
        left.append(gone.events.get())
    assert not any(isinstance(event, Ended | Failed) for event in left)


def test_a_prompt_that_does_not_fit_is_told_both_numbers(service):
    with pytest.raises(PromptTooLongError, match="context is 240 tokens.*300 new"):
        service.prepare(ask_of("Hi.", max_new_tokens=300))
    with pytest.raises(PromptTooLongError, match="context is 240 tokens"):
        service.prepare(ask_of("Hi. " * 100, max_new_tokens=None))
    prepared = service.prepare(ask_of("Hi.", max_new_tokens=None))
    wanted = prepared.requests[0].request.max_new_tokens
    assert prepared.num_prompt_tokens + wanted == 240


def test_a_token_that_the_model_does_not_know_is_refused(service):
    with pytest.raises(ConfigError, match="no embedding"):
        service.prepare(ask_of("Hi.", prompt_ids=(5, 4000)))


def test_a_full_queue_says_when_to_come_again(service, plain):
    long = [Heard(service, ask_of("Go.", max_new_tokens=200)) for _ in range(3)]
    with pytest.raises(OverloadedError, match="answers wait, and 40 may") as caught:
        Heard(service, ask_of("Hi.", num_choices=41))
    assert caught.value.retry_after >= 1
    for one in long:
        one.ticket.cancel()
    assert Heard(service, ask_of(PROMPTS[1])).texts()[0] == plain[PROMPTS[1]]


def test_nothing_is_learned_of_who_does_not_want_it(target, draft):
    service = Service(session_of(target, draft), ServiceConfig("tiny", 240))
    service.start()
    try:
        for text in PROMPTS[:4]:
            Heard(service, ask_of(text, can_teach=False)).all()
        assert service.version == 0
        Heard(service, ask_of(PROMPTS[0])).all()
        # The answer is told before it is learned from.
        service.call(lambda: None)
        assert service.version > 0
    finally:
        service.stop()


def test_a_failed_step_ends_what_runs_and_the_next_is_served(
    target, draft, plain, monkeypatch
):
    session = session_of(target, draft)
    service = Service(session, ServiceConfig("tiny", 240))
    service.start()
    service.wait_until_ready()
    step = session.engine.step

    def fail(*args):
        monkeypatch.setattr(session.engine, "step", step)
        raise RuntimeError("out of memory")

    try:
        monkeypatch.setattr(session.engine, "step", fail)
        failed = Heard(service, ask_of(PROMPTS[0])).all()[-1]
        assert isinstance(failed, Failed)
        assert "out of memory" in str(failed.error)
        assert Heard(service, ask_of(PROMPTS[0])).texts()[0] == plain[PROMPTS[0]]
    finally:
        service.stop()


def test_a_listener_that_fails_fails_for_itself(service, plain):
    def fail(event):
        raise RuntimeError("the loop has ended")

    service.submit(service.prepare(ask_of(PROMPTS[1])), fail)
    assert Heard(service, ask_of(PROMPTS[0])).texts()[0] == plain[PROMPTS[0]]


def test_learning_that_fails_is_paused_and_serving_goes_on(
    target, draft, plain, monkeypatch
):
    session = session_of(target, draft)
    service = Service(session, ServiceConfig("tiny", 240))
    service.start()
    try:
        Heard(service, ask_of(PROMPTS[0])).all()

        def fail(*args):
            raise RuntimeError("out of memory")

        monkeypatch.setattr(session, "_learn_from", fail)
        for text in PROMPTS[:3]:
            assert Heard(service, ask_of(text)).texts()[0] == plain[text]
        service.call(lambda: None)
        assert service.status()["learning"]["paused_for"] == "failed"
    finally:
        service.stop()


def test_a_checkpoint_that_cannot_be_written_stops_nobody(
    target, draft, plain, tmp_path, monkeypatch
):
    config = ServiceConfig("tiny", 240, checkpoint=tmp_path, checkpoint_seconds=0.01)
    session = session_of(target, draft)

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(session, "save", fail)
    service = Service(session, config)
    service.start()
    try:
        for text in PROMPTS[:2]:
            assert Heard(service, ask_of(text)).texts()[0] == plain[text]
        # In the pause that follows it is tried.
        deadline = time.monotonic() + 30
        while not service.status()["learning"]["save_error"]:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert Heard(service, ask_of(PROMPTS[2])).texts()[0] == plain[PROMPTS[2]]
    finally:
        service.stop()


def test_who_stops_a_service_that_compiles_does_not_wait_for_it(target, draft):
    service = Service(session_of(target, draft), ServiceConfig("tiny", 500))
    service.start()
    service.stop(grace=0.0)
    assert not service.is_alive
    assert not service.is_ready


def test_what_was_learned_is_kept_and_gone_on_with(target, draft, tmp_path):
    config = ServiceConfig("tiny", 240, checkpoint=tmp_path / "kept")
    service = Service(session_of(target, draft), config)
    service.start()
    for text in PROMPTS:
        Heard(service, ask_of(text)).all()
    # The first checkpoint has nobody wait for programs.
    assert service.administer("checkpoint")["saved"] is not None
    assert service.status()["totals"]["num_compiles_after_warm_up"] == 0
    service.stop()
    version = service.version
    assert version > 0
    with pytest.raises(OverloadedError, match="about to end"):
        Heard(service, ask_of(PROMPTS[0]))

    session = session_of(target, draft)
    # Prompts are not kept unless that is asked for.
    with pytest.warns(UserWarning, match="without past traffic"):
        session.resume(config.checkpoint)
    assert session.version == version


def version_of(service):
    return service.status()["draft"]["version"]


def test_an_administrator_stops_learning_and_goes_back(service, plain):
    Heard(service, ask_of(PROMPTS[6])).all()
    service.administer("pin")
    before = version_of(service)
    for text in PROMPTS[:3]:
        Heard(service, ask_of(text)).all()
    service.call(lambda: None)
    assert version_of(service) == before > 0
    assert service.status()["learning"]["paused_for"] == "pinned"

    # What was served at the start was kept.
    back = service.administer("rollback")
    assert back == {"restored": 0, "version": before + 1}
    assert Heard(service, ask_of(PROMPTS[5])).texts()[0] == plain[PROMPTS[5]]
    with pytest.raises(ConfigError, match="no earlier version 77 is kept"):
        service.administer("rollback", version=77)

    service.administer("unpin")
    Heard(service, ask_of(PROMPTS[4])).all()
    service.call(lambda: None)
    assert version_of(service) > before + 1


def test_what_cannot_be_administered_says_why(service):
    with pytest.raises(ConfigError, match="no action 'fly'; use checkpoint"):
        service.administer("fly")
    with pytest.raises(ConfigError, match="no folder for checkpoints"):
        service.administer("checkpoint")
    with pytest.raises(ConfigError, match="no folder of drafts"):
        service.administer("load", name="a")


def test_drafts_are_loaded_by_name_from_their_folder_alone(
    target, draft, plain, tmp_path
):
    folder = tmp_path / "drafts"
    Session(target, draft).save(folder / "mine")
    loaded = random_head(target, 100)
    Session(target, loaded).save(folder / "smaller")
    config = ServiceConfig("tiny", 240, drafts=folder)
    service = Service(session_of(target, draft), config)
    service.start()
    try:
        for wrong in ("../mine", "/etc", "", ".hidden", "a/b"):
            with pytest.raises(ConfigError, match="is no name of a folder in drafts"):
                service.administer("load", name=wrong)
        with pytest.raises(ConfigError, match="other shapes"):
            service.administer("load", name="smaller")
        assert service.administer("load", name="mine")["version"] == 1
        assert Heard(service, ask_of(PROMPTS[2])).texts()[0] == plain[PROMPTS[2]]
    finally:
        service.stop()


@pytest.mark.usefixtures("asked_greedily")
def test_what_is_forgotten_is_gone(target, draft):
    learner = LearnerConfig("gradient", update_every_prompts=50, window=16)
    session = Session(target, draft, learner=learner, **HOW)
    service = Service(session, ServiceConfig("tiny", 240))
    service.start()
    try:
        for text in PROMPTS[:3]:
            Heard(service, ask_of(text)).all()
        service.call(lambda: None)
        assert int(session.memory.counts.sum()) > 0
        assert "weights" in service.administer("forget")["stays"]
        assert int(session.memory.counts.sum()) == 0
        assert not np.any(session.state.traffic.ring.segments.weight)
        done = service.administer("forget", is_draft_too=True)
        assert "checkpoints" in done["stays"]
    finally:
        service.stop()


@pytest.mark.usefixtures("asked_greedily")
def test_what_an_administrator_changed_is_saved_though_nobody_asked_since(
    target, draft, tmp_path
):
    learner = LearnerConfig("gradient", update_every_prompts=50, window=16)
    new = lambda: Session(target, draft, learner=learner, **HOW)
    session = new()
    config = ServiceConfig("tiny", 240, checkpoint=tmp_path, keeps_traffic=True)
    service = Service(session, config)
    service.start()
    try:
        for text in PROMPTS[:3]:
            Heard(service, ask_of(text)).all()
        service.administer("checkpoint")
        service.administer("forget", is_draft_too=True)
        version = version_of(service)
    finally:
        service.stop()

    resumed = new()
    resumed.resume(tmp_path)
    assert resumed.version == version > 0
    assert int(resumed.memory.counts.sum()) == 0
    assert not np.any(resumed.state.traffic.ring.segments.weight)


@pytest.mark.usefixtures("asked_greedily")
def test_a_scope_is_forgotten_by_name_in_older_checkpoints_too(
    target, draft, plain, tmp_path
):
    learner = LearnerConfig("gradient", update_every_prompts=50, window=16)
    new = lambda: Session(target, draft, learner=learner, **HOW)
    session = new()
    config = ServiceConfig("tiny", 240, checkpoint=tmp_path, keeps_traffic=True)
    service = Service(session, config)
    service.start()
    try:
        asked = zip(PROMPTS[:4], ("ada", "ada/x", "bob", "eve"), strict=True)
        for text, scope in asked:
            ask = ask_of(text, scope=scope, is_shared=scope != "eve")
            assert Heard(service, ask).texts()[0] == plain[text]
            service.administer("checkpoint")
        numbers = {one.name: one.number for one in session.scopes.known}
        num_compiles = lambda: service.status()["totals"]["num_compiles_after_warm_up"]
        before = num_compiles()
        assert len(checkpoint.steps(tmp_path)) == 2

        done = service.administer("forget", scope="ada")
        assert done["scopes"] == ["ada", "ada/x"]
        assert "shared by all" in done["stays"]
        # What eve alone was served with has not touched the weights.
        done = service.administer("forget", scope="eve")
        assert "nothing in the draft's weights" in done["stays"]
        done = service.administer("forget", scope="ada")
        assert done["scopes"] == []
        assert "not known now" in done["stays"]
        with pytest.raises(ConfigError, match="scope is empty"):
            service.administer("forget", scope="")
        assert len(checkpoint.steps(tmp_path)) == 1
        # Rows of others do not wait for a program.
        assert num_compiles() == before
    finally:
        service.stop()

    resumed = new()
    resumed.resume(tmp_path)
    owners = {0, numbers["bob"]}
    assert [one.name for one in resumed.scopes.known] == ["bob"]
    assert set(np.unique(resumed.memory.owners)) == owners
    assert set(np.unique(resumed.state.traffic.ring.owners)) == owners


def test_who_is_forgotten_while_answered_is_not_learned_from(target, draft):
    session = session_of(target, draft)
    service = Service(session, ServiceConfig("tiny", 240))
    service.start()
    try:
        service.wait_until_ready()
        heard = {
            scope: Heard(service, ask_of(PROMPTS[0], scope=scope))
            for scope in ("ada/x", "bob")
        }
        service.administer("forget", scope="ada")
        for one in heard.values():
            one.all()
        service.call(lambda: None)
        bob = session.scopes.find("bob").number
        assert set(np.unique(session.memory.owners)) == {0, bob}
    finally:
        service.stop()


@pytest.mark.usefixtures("asked_greedily")
def test_scopes_that_share_nothing_have_drafts_of_their_own(
    target, draft, plain, monkeypatch
):
    monkeypatch.setattr(deltas, "_NUM_SEEN", 8)
    learner = LearnerConfig("head", delta_rank=4, memory_slots=0)
    session = Session(target, draft, learner=learner, **HOW)
    service = Service(session, ServiceConfig("tiny", 240))
    service.start()
    try:
        service.wait_until_ready()
        asked = [(text, scope) for text in PROMPTS[:3] for scope in ("ada", "bob", "")]
        heard = [
            (text, Heard(service, ask_of(text, scope=scope, is_shared=False)))
            for text, scope in asked
        ]
        for text, one in heard:
            assert one.texts()[0] == plain[text]
        service.call(lambda: None)
        numbers = {one.name: one.number for one in session.scopes.known}
        owners = lambda: set(np.unique(session.state.traffic.deltas.owners))
        assert owners() == {0, *numbers.values()}
        assert np.asarray(session.served_draft.deltas.shifts).any()
        assert service.version == 0
        own = lambda: service.status()["learning"]["own_drafts"]
        leads = np.asarray(session.state.traffic.deltas.leads)
        num_right = int((leads > 0).sum())
        assert own() == {"num": 2, "num_drafting": num_right}

        done = service.administer("forget", scope="ada")
        assert own()["num"] == 1
        assert "own drafts of ada" in done["forgotten"]
        assert owners() == {0, numbers["bob"]}
        assert service.status()["totals"]["num_compiles_after_warm_up"] == 0
    finally:
        service.stop()


def practising(target, draft, monkeypatch, **settings):
    """A service that takes whatever its random target writes for a user's turn."""
    session = Session(target, draft, learner="head", learn_idle=2, **HOW)
    numbers = iter(range(1000))

    def prompt_of(writing, completion):
        number = next(numbers)
        row = {"prompt": f"{writing.begin} number {number}."}
        return parse_prompt(row, f"exercise-{number}")

    monkeypatch.setattr(session.practice, "_prompt_of", prompt_of)
    return Service(session, ServiceConfig("tiny", 240, **settings))


@pytest.mark.usefixtures("asked_greedily")
def test_an_idle_service_practises_and_makes_way(target, draft, plain, monkeypatch):
    service = practising(target, draft, monkeypatch)
    service.start()
    counts = lambda: service.status()["learning"]["practice"]
    try:
        service.wait_until_ready()
        texts = [text for text in PROMPTS if plain[text].strip()][:4]
        assert len(texts) == 4
        num_tokens = 0
        for text in texts:
            heard = Heard(service, ask_of(text)).all()
            assert "".join(one.text for one in heard[:-1]) == plain[text]
            num_tokens += heard[-1].usage.completion
        # Every answer but the first has another one to begin from.
        wait_for(lambda: counts()["num_exercises"] == 6)
        status = service.status()
        assert status["totals"]["num_answers"] == status["learning"]["num_answers"] == 4
        assert status["totals"]["num_tokens"] == num_tokens
        # Nobody goes on from an exercise.
        assert status["kept"]["num_rows"] == 4
        assert status["totals"]["num_compiles_after_warm_up"] == 0
        assert status["queue"]["num_running"] == 0

        # Whoever comes in the middle of one is answered, and it is begun again.
        begun = threading.Event()
        join = service._live.join

        def watch(request):
            join(request)
            if request.is_practice:
                begun.set()

        monkeypatch.setattr(service._live, "join", watch)
        Heard(service, ask_of(texts[0])).all()
        assert begun.wait(60)
        assert Heard(service, ask_of(texts[1])).texts()[0] == plain[texts[1]]
        wait_for(lambda: counts()["num_exercises"] == 10)
    finally:
        service.stop()


@pytest.mark.usefixtures("asked_greedily")
def test_a_paused_service_writes_nothing(target, draft, monkeypatch):
    service = practising(target, draft, monkeypatch)
    service.start()
    try:
        service.administer("pause")
        for text in PROMPTS[:3]:
            Heard(service, ask_of(text)).all()
        assert service.call(service._learning.next_exercise) is None
        assert service.status()["learning"]["practice"]["num_tokens"] == 0
    finally:
        service.stop()


@pytest.mark.usefixtures("asked_greedily")
def test_nothing_is_written_of_who_was_forgotten(target, draft, plain, monkeypatch):
    service = practising(target, draft, monkeypatch)
    service.start()
    texts = [text for text in PROMPTS if plain[text].strip()]
    try:
        monkeypatch.setattr(service, "_practise", lambda: False)
        for text in texts[:2]:
            Heard(service, ask_of(text, scope="ann")).all()
        assert service.call(lambda: service._session.practice.num_due) == 4
        service.administer("forget", scope="ann")
        assert service.call(lambda: service._session.practice.num_due) == 0
    finally:
        service.stop()
