"""Self-critical training: the gradient is that of the expected reward, of the policy that was sampled."""

from functools import partial
from itertools import product

import pytest
import torch
from test_task import rows
from test_training import one_line
from variants import DECODERS, KINDS, D, E, some_annotations

from captioner.bridges import LinearBridge
from captioner.cli import main
from captioner.errors import InputError
from captioner.metrics import cider_d, ptb_tokenize
from captioner.model import Captioner
from captioner.search import Samples, sample
from captioner.self_critical import Reward, SelfCritical, rescore
from captioner.task import CaptioningTask
from captioner.vocabulary import BEGIN, END, PAD, UNKNOWN, Vocabulary, pad

TWO = Vocabulary(["cat", "dog"])
WORDS = Vocabulary("a brown cat dog grass is on runs the".split())
REFERENCES = {
    "a": ["A dog runs on the grass.", "the brown dog runs"],
    "b": ["A cat sleeps.", "a cat is asleep on the grass"],
    "c": ["Two birds.", "birds in the sky"],
}


def captioner(decoder="LSTM-Additive-before-fed-gate-deep-mean", vocabulary=TWO, scale=4):
    """A model of clear preferences in float64, with a dropout that would be seen."""
    torch.manual_seed(0)
    encoder = torch.nn.Conv2d(3, D, 1)
    encoder.annotation_dim = D
    bridge = partial(LinearBridge, dim=8, dropout=0.5)
    model = Captioner(
        encoder, vocabulary, bridge=bridge, decoder=DECODERS[decoder], embedding_dim=E, dropout=0.5
    ).double()
    with torch.no_grad():
        for part in (model.decoder, model.output):
            for parameter in part.parameters():
                parameter.mul_(scale)
    return model


def all_captions(length):
    """All that can be drawn of at most so many tokens, of every id that there is: tuples of ids."""
    ended = [
        (*ids, END)
        for words in range(length)
        for ids in product([index for index in range(len(TWO)) if index != END], repeat=words)
    ]
    return ended + [*product([index for index in range(len(TWO)) if index != END], repeat=length)]


def as_samples(captions):
    """Captions of each image as samples, with something behind their ends that means nothing."""
    longest = max(len(ids) for image in captions for ids in image)
    tokens = [[[*ids, *[4] * (longest - len(ids))] for ids in image] for image in captions]
    return Samples(torch.tensor(tokens), torch.tensor([[len(ids) for ids in image] for image in captions]), None)


def repeated(annotations, count):
    return annotations._replace(values=annotations.values.expand(count, -1, -1))


def gradients(loss, model):
    return torch.autograd.grad(loss, [*model.bridge.parameters(), *model.decoder.parameters()], materialize_grads=True)


class Given:
    """A reward that knows what each drawn caption gets."""

    vocabulary = TWO

    def __init__(self, rewards):
        self.rewards = rewards

    def __call__(self, image_ids, samples):
        return self.rewards


# The gradient


@pytest.mark.parametrize(("samples", "length"), [(2, 2), (3, 1)])
def test_the_gradient_is_that_of_the_enumerated_expected_reward(samples, length, monkeypatch):
    model, image = captioner().train(), some_annotations(1)
    captions = all_captions(length)
    worth = torch.randn(len(captions), dtype=torch.double)
    model.eval()
    probabilities = rescore(model, repeated(image, len(captions)), as_samples([[ids] for ids in captions]))[:, 0].exp()
    assert probabilities.sum().item() == pytest.approx(1, abs=1e-12)  # there are no others
    wanted = gradients((probabilities * worth).sum(), model)
    model.train()

    draws = torch.tensor([*product(range(len(captions)), repeat=samples)])
    monkeypatch.setattr(
        model, "sample", lambda *_, **__: as_samples([[captions[place] for place in draw] for draw in draws.tolist()])
    )
    # The objective is the mean over images and linear in the rewards: so each draw counts by its probability.
    share = probabilities.detach()[draws].prod(1) * len(draws)
    tokens = torch.full((len(draws), 1, 2), END)
    loss = SelfCritical(samples, cross_entropy=0.0)(
        model, repeated(image, len(draws)), tokens, range(len(draws)), Given(worth[draws] * share[:, None])
    )
    assert max(part.abs().max() for part in wanted) > 0.01
    for found, each in zip(gradients(loss.total, model), wanted, strict=True):
        torch.testing.assert_close(found, -each, rtol=1e-9, atol=1e-12)


def test_what_all_samples_share_moves_nothing():
    model, annotations = captioner().train(), some_annotations(2)
    loss = SelfCritical(3, cross_entropy=0.0)(
        model, annotations, torch.full((2, 1, 2), END), "ab", Given(torch.full((2, 3), 0.5))
    )
    assert all(part.abs().max() < 1e-12 for part in gradients(loss.total, model))


def test_the_share_of_cross_entropy_is_that_of_whole_captions():
    model, annotations = captioner(vocabulary=WORDS).eval(), some_annotations(2)
    tokens = pad([[[BEGIN, 4, 5, END], [BEGIN, 6, END]], [[BEGIN, 7, 8, 9, 4, END]]])
    reward = Given(torch.zeros(2, 2))
    reward.vocabulary = WORDS
    loss = SelfCritical(2, cross_entropy=0.25, label_smoothing=0.0)(model, annotations, tokens, "ab", reward)
    log_probabilities = model(annotations, tokens)[0].log_softmax(-1)
    each = log_probabilities.gather(-1, tokens[..., 1:, None]).squeeze(-1) * (tokens[..., 1:] != PAD)
    assert loss.total.item() == pytest.approx(-0.25 * each.sum().item() / 3)
    assert loss.cross_entropy.item() == pytest.approx(-each.sum().item() / 10)


def test_captions_count_alike_in_whichever_process_they_are(monkeypatch):
    model, annotations = captioner(vocabulary=WORDS).eval(), some_annotations(2)
    tokens = pad([[[BEGIN, 4, 5, END], [BEGIN, 6, END]], [[BEGIN, 7, 8, 9, 4, 6, 7, END]]])
    reward = Given(torch.zeros(1, 2))
    reward.vocabulary = WORDS
    words_and_captions = torch.tensor([[5, 2], [7, 1]])  # of two processes

    def averaged(values):
        """Average over both, by what the other one has: words, or words and captions."""
        return words_and_captions[:, : values.numel()].double().mean(0).view(values.shape)

    monkeypatch.setattr("captioner.objectives.average", averaged)
    monkeypatch.setattr("captioner.self_critical.average", averaged)
    objective = SelfCritical(2, cross_entropy=0.25, label_smoothing=0.0)
    shares = [
        objective(model, annotations._replace(values=values[None]), ids[None], "a", reward).total.item()
        for values, ids in zip(annotations.values, tokens, strict=True)
    ]
    log_probabilities = model(annotations, tokens)[0].log_softmax(-1)
    each = log_probabilities.gather(-1, tokens[..., 1:, None]).squeeze(-1) * (tokens[..., 1:] != PAD)
    assert sum(shares) / 2 == pytest.approx(-0.25 * each.sum().item() / 3)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_every_parameter_learns_in_either_precision(precision):
    # Autocast keeps what it converted; what it converted while captions were drawn carries no gradient.
    model, annotations = captioner(vocabulary=WORDS).float().train(), some_annotations(3)
    annotations = annotations._replace(values=annotations.values.float())
    reward, tokens = Reward(REFERENCES, WORDS), torch.full((3, 1, 2), END)
    with torch.autocast("cpu", precision, enabled=precision == torch.bfloat16):
        loss = SelfCritical(4, cross_entropy=0.0)(model, annotations, tokens, "abc", reward)
    loss.total.backward()
    parts = (model.bridge, model.decoder, model.embedding, model.output)
    silent = [name for part in parts for name, p in part.named_parameters() if p.grad is None or not p.grad.any()]
    # The weights over the regions sum to 1 whatever is added to all keys.
    assert silent in ([], ["attention.key.bias"])


def test_it_learns_to_say_what_is_rewarded():
    model, annotations = captioner(scale=1).train(), some_annotations(4)
    optimizer = torch.optim.Adam(model.parameters(), 0.05)

    class LikesCats:
        vocabulary = TWO

        def __call__(self, image_ids, samples):
            counts = torch.arange(samples.tokens.size(2)) < samples.lengths[..., None]
            return ((samples.tokens == 4) & counts).double().sum(2)

    rewards = []
    for _ in range(40):
        loss = SelfCritical(5, 0.0)(model, annotations, torch.full((4, 1, 2), END), "abcd", LikesCats(), max_words=3)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        rewards.append(loss.reward.item())
    assert rewards[0] < 1.5 and rewards[-1] > 3.5


# The samples


@pytest.mark.parametrize("name", KINDS)
def test_samples_have_the_log_probabilities_of_one_pass_over_them(name):
    model, annotations = captioner(name, WORDS, scale=2).float().eval(), some_annotations(3)
    annotations = annotations._replace(values=annotations.values.float())
    samples = model.sample(annotations, samples=5, max_tokens=9)
    assert samples.lengths.min() < samples.lengths.max() == samples.tokens.size(2) <= 9
    torch.testing.assert_close(rescore(model, annotations, samples), samples.log_probabilities, rtol=0, atol=1e-5)


def test_dropout_is_off_where_captions_are_drawn_and_scored_and_then_on_again(monkeypatch):
    model, annotations = captioner(vocabulary=WORDS).train(), some_annotations(3)
    drawn, scored = [], []
    draw, score = model.sample, model.score_words

    def watched_sample(*given, **settings):
        drawn.append(model.training)
        return draw(*given, **settings)

    def watched_score(*given, **settings):
        scored.append(model.training)
        return score(*given, **settings)

    monkeypatch.setattr(model, "sample", watched_sample)
    monkeypatch.setattr(model, "score_words", watched_score)
    SelfCritical()(model, annotations, torch.full((3, 1, 2), END), "abc", Reward(REFERENCES, WORDS))
    assert drawn == [False] and scored == [False, True] and model.training  # the share of cross-entropy has its dropout


def test_captions_are_drawn_by_their_probability():
    model, image = captioner(scale=2).eval(), some_annotations(1)
    captions = all_captions(2)
    probabilities = rescore(model, repeated(image, len(captions)), as_samples([[ids] for ids in captions]))[:, 0].exp()
    samples = model.sample(image, samples=20_000, max_tokens=2)
    drawn = [
        tuple(ids[:length]) for ids, length in zip(samples.tokens[0].tolist(), samples.lengths[0].tolist(), strict=True)
    ]
    shares = torch.tensor([drawn.count(ids) / 20_000 for ids in captions])
    assert {PAD, BEGIN, UNKNOWN} & {index for ids in drawn for index in ids}  # nothing is banned
    assert (shares - probabilities.detach()).abs().max() < 0.015


def test_a_caption_that_does_not_end_is_broken_off():
    def never(words, memory, state):
        return torch.log(torch.tensor([[0.5, 0.0, 0.5]])).expand(len(words), -1), state

    samples = sample(never, (torch.zeros(2),), (), begin=2, end=1, samples=3, max_tokens=7)
    assert samples.tokens.shape == (2, 3, 7) and samples.lengths.eq(7).all()
    torch.testing.assert_close(samples.log_probabilities, torch.full((2, 3), 0.5, dtype=torch.double).log() * 7)


def test_scores_that_are_no_numbers_draw_nothing():
    model = captioner().eval()
    with torch.no_grad():
        model.output.bias.fill_(torch.nan)
    with pytest.raises(InputError, match="diverged"):
        model.sample(some_annotations(2), samples=3, max_tokens=4)


# The reward


def ids(text, vocabulary=WORDS):
    return vocabulary.encode(text.split(), 20)[1:]


def test_the_reward_is_cider_d_with_the_end_as_a_word():
    reward = Reward(REFERENCES, WORDS)
    captions = {"c": "the dog runs", "a": "a dog runs on the grass", "b": "a cat is on the"}
    found = reward([*captions], as_samples([[ids(text)] for text in captions.values()]))
    ended = {image: [[*ptb_tokenize(text), "<eos>"] for text in texts] for image, texts in REFERENCES.items()}
    wanted = cider_d(ended, {image: [*text.split(), "<eos>"] for image, text in captions.items()})
    assert found[:, 0].tolist() == pytest.approx(list(wanted.per_image))
    assert found[1, 0] > 1


def test_a_caption_that_breaks_off_is_worth_less():
    reward = Reward(REFERENCES, WORDS)
    whole, broken = reward("a", as_samples([[ids("a dog runs on the grass"), ids("a dog runs on the grass")[:-1]]]))[0]
    assert broken < 0.95 * whole


def test_what_is_no_word_is_worth_less_too():
    reward, whole = Reward(REFERENCES, WORDS), ids("a dog runs on the grass")
    captions = [whole, *([*whole[:3], index, *whole[3:]] for index in (PAD, BEGIN, UNKNOWN))]
    first, *others = reward("a", as_samples([captions]))[0].tolist()
    assert max(others) < 0.9 * first


def test_the_rewards_frequencies_have_a_fingerprint():
    one = Reward(REFERENCES, WORDS).document_frequencies
    assert one.fingerprint == Reward(dict(reversed(REFERENCES.items())), TWO).document_frequencies.fingerprint
    other = Reward({**REFERENCES, "c": ["Two cats."]}, WORDS).document_frequencies
    assert one.fingerprint != other.fingerprint and one.counts[("<eos>",)] == one.images == 3


def test_a_reward_of_another_vocabulary_is_refused():
    model = captioner(vocabulary=WORDS)
    reward = Reward(REFERENCES, Vocabulary(WORDS.words[::-1]))  # as many words, in another order
    with pytest.raises(InputError, match="not those that the captioner says"):
        SelfCritical()(model, some_annotations(3), torch.full((3, 1, 2), END), "abc", reward)


@pytest.mark.parametrize("settings", [{"samples": 1}, {"cross_entropy": 1.0}, {"cross_entropy": -0.1}])
def test_settings_that_train_nothing_are_refused(settings):
    with pytest.raises(InputError, match=r"at least 2 samples"):
        SelfCritical(**settings)


# The command line

SELF_CRITICAL = ["--model.objective", "SelfCritical", "--model.learning_rate", "1e-3"]


@pytest.fixture(scope="module")
def rewarded(fit, best):
    return fit(*SELF_CRITICAL, "--model.initial_weights", str(best), "--trainer.max_epochs", "2")


def test_a_run_goes_on_from_cross_entropy_and_tells_its_reward(rewarded, best, recipe, tmp_path, capsys):
    line = next(line for line in rows(rewarded) if line["train/reward"])
    assert float(line["train/reward"]) > 0 and float(line["train/cross_entropy"]) > 0
    flags = ["--config", str(recipe), "--trainer.default_root_dir", str(tmp_path), "--model.initial_weights", str(best)]
    assert main(["fit", *flags, *SELF_CRITICAL]) == 0
    captured = capsys.readouterr()
    assert "\nepoch 1  0:" in captured.out and "  reward 0." in captured.out and captured.err == ""


def test_it_says_where_to_start_from(recipe, tmp_path, capsys):
    assert main(["fit", "--config", str(recipe), "--trainer.default_root_dir", str(tmp_path), *SELF_CRITICAL]) == 2
    assert "model.initial_weights" in one_line(capsys)


def test_mirrored_images_have_no_rewards(recipe, best, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(CaptioningTask, "_fill_caches", lambda task: pytest.fail("this takes long, and is in vain"))
    flags = ["--trainer.default_root_dir", str(tmp_path), "--model.initial_weights", str(best), "--data.flip", "true"]
    assert main(["fit", "--config", str(recipe), *flags, *SELF_CRITICAL]) == 2
    assert "data.flip" in one_line(capsys)


def test_going_on_with_other_references_is_refused(rewarded, recipe, tmp_path, capsys):
    last = rewarded.trainer.checkpoint_callback.last_model_path
    saved = torch.load(last, weights_only=True)
    assert saved["reward"] == rewarded.model.reward.document_frequencies.fingerprint
    torch.save({**saved, "reward": "0123456789abcdef"}, tmp_path / "other.ckpt")
    flags = ["--config", str(recipe), "--trainer.default_root_dir", str(tmp_path), *SELF_CRITICAL]
    assert main(["fit", *flags, "--ckpt_path", str(tmp_path / "other.ckpt"), "--trainer.max_epochs", "3"]) == 2
    assert "0123456789abcdef" in one_line(capsys)
    assert main(["fit", *flags, "--ckpt_path", last, "--trainer.max_epochs", "3"]) == 0
