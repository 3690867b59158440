"""The task: a captioner in training, validation and test, for Lightning."""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import GradClipAlgorithmType
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer

from captioner.annotation_cache import AnnotationCache, fingerprint
from captioner.attention import Annotations
from captioner.attention_health import Health, Look, Report, report, sum_up
from captioner.bridges import Bridge, LinearBridge
from captioner.cache_folder import Index
from captioner.checkpoint import KEY, pack, read, unpack
from captioner.datamodule import Batch, CaptionData
from captioner.decoders import Decoder, LSTMDecoder
from captioner.encoders import Encoder, ForeignEncoder, PrecomputedRegions
from captioner.ensemble import Ensemble
from captioner.errors import InputError
from captioner.evaluation import Evaluation, ReferenceCaptions, evaluate_captions
from captioner.faithfulness import Hiding, attends, examine, probe, texts
from captioner.finiteness import Watch
from captioner.images import Preprocessing, read_image
from captioner.metrics import Score, score_captions
from captioner.model import Captioner, describe
from captioner.objectives import CrossEntropy, WordPresence, average
from captioner.output_files import check_writable
from captioner.results import write_results
from captioner.resumption import Resumption
from captioner.search import Hypothesis
from captioner.self_critical import Reward, SelfCritical
from captioner.tokens import Tokenizer
from captioner.vocabulary import Vocabulary, restore

HIDING = Hiding()  # of regions, in the test; its seed serves all that the test draws
REWARD = "reward"  # where a checkpoint of self-critical training says by whose document frequencies it was rewarded


class CaptioningTask(LightningModule):
    """Trains a captioner and scores it by decoding freely against the raw references.

    Validation decodes greedily, which is cheap; the test decodes with a beam. The captioner itself is built when the
    vocabulary is known, from settings that hold no sizes.

    Parameters
    ----------
    encoder : nn.Module
        VGG16, ResNet, SmallCNN, ForeignEncoder around any other module, or PrecomputedRegions.
    bridge : callable
        What stands between encoder and decoder: LinearBridge, TransformerBridge or NoBridge.
    decoder : callable
        LSTMDecoder, GRUDecoder or TransformerDecoder; an attention is among the settings of the first two.
    embedding_dim : int
        Size of a word's embedding.
    dropout : float
        Share of values dropped from embeddings and from what the output layer reads.
    tie_weights : bool
        Use the embedding's matrix as the output layer's.
    objective : CrossEntropy or SelfCritical, optional
        What is minimised; by default CrossEntropy without label smoothing. SelfCritical goes on from `initial_weights`.
    word_presence : float
        Weight of telling the captions' words from the regions alone, for an encoder that learns; see
        :class:`~captioner.objectives.WordPresence`.
    learning_rate : float
        Largest learning rate of AdamW.
    encoder_learning_rate : float, optional
        The same for an encoder that learns, by default `learning_rate`. It rises and falls with the other.
    weight_decay : float
        Of the matrices; biases, norms and embeddings have none.
    warmup : float
        Share of all steps in which the learning rate rises from zero; then it falls to zero along a cosine.
    beam_size : int
        Of the test.
    length_penalty : float
        Of the test: 0 ranks by log-probability, 1 by its mean per token.
    max_words : int, optional
        Longest caption in validation and test, in words, or in characters or byte pairs where the model says these; by
        default 20, 120 and 40 of them.
    compile : bool
        Compile the decoder for training with :func:`torch.compile`, which wants a C++ compiler for a CPU.
    initial_weights : Path, optional
        A checkpoint of a captioner of the same sizes and words, whose weights training starts from: first the decoder,
        then both. A run that goes on from --ckpt_path does not read it.
    ensemble : Path or list of Path, optional
        Of the test, and refused elsewhere: further checkpoints, with which the tested one chooses each word by their
        mean probability. Their words must be the same, all else may differ.
    results : Path, optional
        Of the test, and refused elsewhere: where to write the captions that were scored, as a COCO results file for
        `captioner score`.
    attention_health : bool
        Measure in every validation and test whether captions depend on attention, see
        :mod:`captioner.attention_health`. It takes about a third of a test's time, and in a validation about as long as
        captioning does.

    Attributes
    ----------
    scored : dict of str to Score
        What the last validation or test of all images gave.
    scored_by : str
        The tokenizer of those scores.
    captions : dict
        What was scored, by image.
    evaluation : Evaluation or None
        What the last test gave, with intervals.
    health : Health or None
        What the last validation found of attention; None where nothing was measured, see `why_no_health`.
    report : Report or None
        The same of the last test.

    Raises
    ------
    InputError
        Where a learning rate is negative.
    """

    def __init__(
        self,
        encoder: nn.Module,
        bridge: Callable[[int], Bridge] = LinearBridge,
        decoder: Callable[[int, int], Decoder] = LSTMDecoder,
        embedding_dim: int = 512,
        dropout: float = 0.0,
        tie_weights: bool = False,
        objective: CrossEntropy | SelfCritical | None = None,
        word_presence: float = 0.0,
        learning_rate: float = 5e-4,
        encoder_learning_rate: float | None = None,
        weight_decay: float = 0.05,
        warmup: float = 0.05,
        beam_size: int = 5,
        length_penalty: float = 0.7,
        max_words: int | None = None,
        compile: bool = False,
        initial_weights: Path | None = None,
        ensemble: list[Path] | Path | None = None,
        results: Path | None = None,
        attention_health: bool = True,
    ) -> None:
        super().__init__()
        for name, rate in {"learning_rate": learning_rate, "encoder_learning_rate": encoder_learning_rate}.items():
            if rate is not None and rate < 0:
                raise InputError(f"model.{name} is {rate}: give a number that is not negative.")
        # Held in a tuple until the captioner owns it: a module that is registered twice has two names in a checkpoint.
        self._encoder = (encoder if isinstance(encoder, Encoder) else ForeignEncoder(encoder),)
        self._settings: dict[str, Any] = {
            "bridge": bridge,
            "decoder": decoder,
            "embedding_dim": embedding_dim,
            "dropout": dropout,
            "tie_weights": tie_weights,
        }
        self.objective = objective or CrossEntropy()
        self.word_presence = word_presence
        self.learning_rate, self.encoder_learning_rate = learning_rate, encoder_learning_rate
        self.weight_decay, self.warmup = weight_decay, warmup
        self.beam_size, self.length_penalty, self.max_words = beam_size, length_penalty, max_words
        self.compiles, self.initial_weights = compile, initial_weights
        self.model: Captioner | None = None
        self.configuration = ""  # a digest of all settings of its training, which checkpoints keep
        self._starts = False  # built, and with no weights from anywhere yet
        self._watch = Watch()
        self.presence: WordPresence | None = None
        self.ensemble = [ensemble] if isinstance(ensemble, str | Path) else list(ensemble or ())
        self.results, self.attention_health = results, attention_health
        self._members: Ensemble | None = None
        self.scores: dict[str, float] = {}
        self.scored: dict[str, Score] = {}
        self.scored_by: Tokenizer = "ptb"
        self.captions: dict[str | int, str] = {}
        self.evaluation: Evaluation | None = None
        self.health: Health | None = None
        self.report: Report | None = None
        self._looks: dict[str | int, Look] = {}

    @property
    def captioner(self) -> Captioner:
        """The model, once it is built."""
        if self.model is None:
            raise InputError("The vocabulary is not known yet: train first, or give a checkpoint with --ckpt_path.")
        return self.model

    @property
    def data(self) -> CaptionData:
        """The trainer's data module."""
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, CaptionData):
            raise InputError("CaptioningTask takes its vocabulary and references from CaptionData: give datamodule=.")
        return data

    def check_settings(self, stage: str) -> None:
        """Refuse what is of the test only in "fit" and "validate".

        Raises
        ------
        InputError
            Where there is such a setting.
        """
        for name, given in {"ensemble": self.ensemble, "results": self.results}.items():
            if given and stage != "test":
                raise InputError(f"model.{name} is of `captioner test` only: leave it out of `captioner {stage}`.")

    def setup(self, stage: str) -> None:
        """Refuse settings of another stage, and those that do not go together, before caches are filled."""
        self.check_settings(TrainerFn(stage).value)
        if isinstance(self._encoder[0], PrecomputedRegions) != (self.data.regions is not None):
            raise InputError(
                "data.regions and the encoder PrecomputedRegions belong together: give both, as in --data.regions "
                "FOLDER --model.encoder PrecomputedRegions --model.encoder.dim 2048, or neither."
            )
        if stage == TrainerFn.FITTING and isinstance(self.objective, SelfCritical) and self.data.flip:
            raise InputError(
                "Self-critical training rewards captions by those of the images as they are, and not mirrored: set "
                "data.flip to false."
            )

    def configure_model(self) -> None:
        """Build the captioner from the vocabulary of the training captions; without them it waits for a checkpoint."""
        self.data.preprocessing = self._encoder[0].preprocessing
        self.data.region_dim = self._encoder[0].annotation_dim
        if self.model is None and self.data.vocabulary is not None:
            self._build(self.data.vocabulary)
            self._starts = True

    def _build(self, vocabulary: Vocabulary) -> None:
        self.model = Captioner(self._encoder[0], vocabulary, **self._settings)
        if self.compiles:
            self.model.decoder.compile()
        decoder = self.model.decoder
        if isinstance(decoder, LSTMDecoder) and not decoder.feed_previous and not self.model.tie_weights:
            self.model.embedding.requires_grad_(False)  # nothing reads it, and DDP would wait for its gradient
        if self.word_presence > 0:
            if not self._encoder[0].learns:
                raise InputError(
                    "word_presence teaches the encoder, which is frozen here: set model.word_presence to 0, or the "
                    "encoder's learns to true."
                )
            # Of words in any case: that some letter is in a caption says nothing about the image. Without training
            # captions there are none, and nothing to teach.
            if self.data.words is not None:
                self.data.teaches_words = True
                self.presence = WordPresence(self._encoder[0].annotation_dim, len(self.data.words))
        if self.encoder_learning_rate is not None and not self._encoder[0].learns:
            raise InputError(
                "encoder_learning_rate is for an encoder that learns, and this one is frozen: set "
                "model.encoder_learning_rate to null, or the encoder's learns to true or to the name of a part."
            )

    def configure_callbacks(self) -> list[Callback]:
        """Let a training be gone on with exactly, whoever has made the trainer."""
        return [Resumption()]

    def _load_initial_weights(self) -> None:
        """Load what training starts from: the weights of `initial_weights`, or else the encoder's pretrained ones."""
        if not self._starts:
            return
        self._starts = False
        if self.initial_weights is None:
            if isinstance(self.objective, SelfCritical):
                raise InputError(
                    "Self-critical training improves a captioner that cross-entropy has trained: give its checkpoint "
                    "as model.initial_weights."
                )
            self.captioner.encoder.load_weights()
            if self.captioner.vocabulary.units != "words":
                # Few of the 256 bytes stand in any caption, and a model learns little else before it knows that.
                frequencies = self.data.frequencies()
                with torch.no_grad():
                    self.captioner.output.bias.copy_((frequencies / frequencies.sum()).log())
            return
        contents = read(self.initial_weights)
        vocabulary = restore(contents.words, contents.vocabulary, self.initial_weights)
        if vocabulary != self.captioner.vocabulary:
            raise InputError(
                f"{self.initial_weights} of model.initial_weights knows {vocabulary}, but not those of these training "
                "captions: give the captions, the units and the minimum_count that it was trained with."
            )
        if wrong := _differing(self.captioner.state_dict(), contents.tensors):
            raise InputError(
                f"The weights in {self.initial_weights} of model.initial_weights are another model's ({len(wrong)} "
                f"tensors differ, {min(wrong)} among them): give the sizes and parts that it was trained with."
            )
        self.captioner.load_state_dict(contents.tensors)

    def _fill_caches(self) -> None:
        """Fill the caches of annotations, where they are asked for."""
        if self.data.cache is None:
            return
        if self.captioner.encoder.learns:
            raise InputError(
                "An encoder that learns cannot be cached, since its annotations change with every step: set data.cache "
                "to null, or the encoder's learns to false."
            )
        with torch.random.fork_rng(devices=()):  # the run that fills the caches is the same as those that find them
            self._open_caches(self.data.cache)

    def _open_caches(self, directory: Path) -> None:
        data, encoder = self.data, self.captioner.encoder
        settings = {**describe(encoder), "precision": str(self.trainer.precision)}
        settings.pop("recompute", None)  # which decides about gradients
        settings.pop("weights", None)  # the tensors themselves are hashed: where they came from changes nothing
        if isinstance(encoder, ForeignEncoder):
            settings["module"] = [encoder.module_name, repr(encoder.module), _source(encoder.module)]

        def opened(name: str, *, mirrored: bool) -> AnnotationCache:
            files = [record.path for record in data.records[name]]
            of_view = {**settings, "view": "mirrored"} if mirrored else settings
            wanted = Index(
                fingerprint(of_view, sorted(encoder.state_dict().items()), files),
                len(files),
                dataset=f"{data.files.format} in {files[0].parent}",
                split=data.splits[name],
                encoder=in_words(encoder, settings["precision"]),
                view="mirrored" if mirrored else "upright",
                ragged=data.regions is not None,
            )
            compute = partial(self._annotate_all, name, mirrored)
            if data.regions is not None:
                compute = partial(data.region_batches, name)
            # Of the processes of a run any one fills it; that another one waits need be said once.
            cache = AnnotationCache.open(
                directory,
                wanted,
                compute,
                say_waiting=self.trainer.is_global_zero,
                missing=lambda: list(data.damaged) if name == "train" else (),
            )
            return data.keep_cache(name, cache)

        data.caches = {name: opened(name, mirrored=False) for name in ("train", "val")}
        if data.flip:
            data.mirrored_cache = opened("train", mirrored=True)

    def _annotate_all(self, name: str, mirrored: bool, first: int) -> Iterator[Annotations]:
        with torch.inference_mode(), self.trainer.precision_plugin.forward_context():
            for images in self.data.images(name, first, mirrored=mirrored):
                yield self.captioner.annotate(images.to(self.device))

    def _annotations(self, batch: Batch) -> Annotations:
        if batch.annotations is not None:
            return batch.annotations
        assert batch.images is not None
        return self.captioner.annotate(batch.images)

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """Return the objective of a batch."""
        assert batch.tokens is not None
        annotations = self._annotations(batch)
        if isinstance(self.objective, SelfCritical):
            total, parts = self._self_critical(self.objective, annotations, batch)
        else:
            total, parts = self._cross_entropy(self.objective, annotations, batch.tokens)
        if self.presence is not None:
            words = batch.tokens if batch.words is None else batch.words
            parts["word_presence"] = self.presence(annotations, words)
            total = total + self.word_presence * parts["word_presence"]
        size = len(batch.image_ids)
        # Over all processes, in one message: Lightning's sync_dist sends two for each value.
        mean, *means = average(torch.stack([total, *parts.values()]))
        self._watch.note(batch.image_ids, total, mean)
        self.log("train/loss", mean, prog_bar=True, batch_size=size)
        self.log_dict({f"train/{name}": part for name, part in zip(parts, means, strict=True)}, batch_size=size)
        return total

    def _cross_entropy(
        self, objective: CrossEntropy, annotations: Annotations, tokens: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        logits, weights, _ = self.captioner.score_words(annotations, tokens, objective.needs_weights)
        loss = objective(logits, tokens[..., 1:], weights, annotations.mask)
        parts = {"cross_entropy": loss.cross_entropy}
        if weights is not None:
            parts["attention"] = loss.attention
        return loss.total, parts

    def _self_critical(
        self, objective: SelfCritical, annotations: Annotations, batch: Batch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        assert batch.tokens is not None
        limit = self.captioner.vocabulary.longest if self.max_words is None else self.max_words
        loss = objective(self.captioner, annotations, batch.tokens, batch.image_ids, self.reward, limit)
        return loss.total, {"reward": loss.reward, "cross_entropy": loss.cross_entropy}

    @cached_property
    def reward(self) -> Reward[str | int]:
        """What drawn captions of the training images are rewarded by."""
        return Reward(self.data.references("train"), self.captioner.vocabulary, self.data.tokenizer)

    def on_validation_epoch_start(self) -> None:
        """Forget the captions of the last round."""
        self._begin("val")

    def on_test_epoch_start(self) -> None:
        """See that the captions can be written, open the other members, and forget the captions of the last round."""
        if self.results is not None:
            check_writable(Path(self.results))
            if Path(self.results).resolve() in [Path(path).resolve() for path in self._checkpoints]:
                raise InputError(f"{self.results} of model.results is a checkpoint to test: write to another file.")
        self._members = Ensemble.open(self.captioner, self.ensemble)
        self._files = {record.image_id: record.path for record in self.data.records["test"]}
        self._generator = torch.Generator().manual_seed(HIDING.seed + self.trainer.global_rank)
        self._begin("test")

    def _begin(self, name: str) -> None:
        self.captions, self._looks, self.health, self.report = {}, {}, None, None
        self._scenes = self.data.scenes(name) if self.why_no_health is None else {}

    @property
    def why_no_health(self) -> str | None:
        """Why attention is not measured, as a sentence; None where it is."""
        if not self.attention_health:
            return "Attention was not measured, since model.attention_health is false."
        if self.ensemble:
            return "Attention was not measured, since each model of an ensemble has its own: test them one by one."
        if not attends(self.captioner):
            return "This decoder has no attention that could be measured: it does not choose where to look."
        return None

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        """Caption a batch greedily, and see where it looked."""
        annotations = self._annotations(batch)
        found = self._keep(batch, self.captioner.search(annotations, beam_size=1, **self._limits))
        if self.why_no_health is None:
            with self._as_written():
                self._looks |= examine(self.captioner, annotations, batch.image_ids, found, scenes=self._scenes)

    def test_step(self, batch: Batch, batch_index: int) -> None:
        """Caption a batch with the beam, and see what its attention is worth."""
        assert self._members is not None
        if batch.annotations is not None:
            annotations = self._members.annotate_regions(batch.annotations)
        else:
            annotations = self._members.annotate(lambda preprocessing: self._pixels(batch, preprocessing))
        search = {"beam_size": self.beam_size, **self._limits}
        found = self._keep(batch, self._members.search(annotations, **search))
        if self.why_no_health is None:
            with self._as_written():
                self._looks |= probe(
                    self.captioner,
                    annotations[0],
                    batch.image_ids,
                    found,
                    hiding=HIDING,
                    generator=self._generator,
                    scenes=self._scenes,
                    **search,
                )

    def _as_written(self) -> AbstractContextManager[Any]:
        """Run a compiled decoder as it is written: it would be compiled anew for other weights and other sizes."""
        return torch.compiler.set_stance("force_eager") if self.compiles else nullcontext()

    @property
    def _checkpoints(self) -> list[str | Path]:
        own = self.trainer.ckpt_path  # none where a model is tested as it is
        return [path for path in (own, *self.ensemble) if path is not None]

    @property
    def _limits(self) -> dict[str, Any]:
        return {"max_words": self.max_words, "length_penalty": self.length_penalty}

    def _pixels(self, batch: Batch, preprocessing: Preprocessing) -> Tensor:
        """Return a test batch's images as a member of the ensemble wants them."""
        assert batch.images is not None
        if preprocessing == self.data.preprocessing:
            return batch.images
        opened = [read_image(self._files[image_id]) for image_id in batch.image_ids]
        return torch.stack([preprocessing.pixels(image) for image in opened]).to(self.device)

    def _keep(self, batch: Batch, found: Sequence[Sequence[Hypothesis]]) -> Sequence[Sequence[int]]:
        """Keep the best captions, and return their ids."""
        best = [hypotheses[0].tokens for hypotheses in found]
        self.captions |= zip(batch.image_ids, texts(self.captioner, best), strict=True)
        return best

    def on_validation_epoch_end(self) -> None:
        """Score the captions of all images against their raw references."""
        self._gather()
        references = self.data.references("val")
        wanted = {image_id: references[image_id] for image_id in self.captions}
        self.scored_by = self.data.scored_by("val")
        self._note("val", score_captions(wanted, self.captions, self.scored_by))
        self.health = sum_up(self._looks)
        if self.health is not None:
            figures = {name: value for name, value in self.health._asdict().items() if isinstance(value, float)}
            self.log_dict({f"attention/{name}": value for name, value in figures.items()}, sync_dist=True)

    def on_test_epoch_end(self) -> None:
        """Score the captions of all images against their raw references, with intervals, and write them if asked to."""
        self._members = None
        self._gather()
        split = self.data.splits["test"]
        references = ReferenceCaptions.of(
            Path(str(self.data.files).replace("{split}", split)),
            split,
            [record for record in self.data.records["test"] if record.image_id in self.captions],
            self.data.tokenizer,
        )
        self.scored_by = references.tokenizer
        self.captions = {image_id: self.captions[image_id] for image_id in references.records}
        source = Path([*self._checkpoints, "the model"][0])
        self.evaluation = evaluate_captions(references, [(source, self.captions)])
        self._note("test", self.evaluation.systems[0].scores)
        if self._looks:
            self.report = report(
                references.tokens,
                self.captions,
                self._looks,
                tokenizer=references.tokenizer,
                beam_size=self.beam_size,
                seed=HIDING.seed,
                hidden=HIDING.share,
            )
        if self.results is not None and self.trainer.is_global_zero:
            write_results(Path(self.results), self.captions)

    def _gather(self) -> None:
        """Give the captions of all processes to each of them, and what was seen of their attention."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            gathered: list[Any] = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(gathered, (self.captions, self._looks))
            # By image: one that a sampler gave to two processes to make their shares equal counts once.
            self.captions, self._looks = (
                {image_id: each for part in parts for image_id, each in part.items()}
                for parts in zip(*gathered, strict=True)
            )

    def _note(self, name: str, scores: dict[str, Score]) -> None:
        self.scored = scores
        self.scores = {metric: score.corpus for metric, score in scores.items()}
        for metric, value in self.scores.items():
            # The same figure in every process; Lightning warns where none is asked to see to that.
            self.log(f"{name}/{metric}", value, prog_bar=metric == "CIDEr-D", sync_dist=True)
        self.scored_images = len(self.captions)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return AdamW with a warm-up and a cosine, stepped with every batch."""
        self._load_initial_weights()  # here it is known whether --ckpt_path has brought others
        self._fill_caches()  # before the steps are counted, for which Lightning makes the loader of the training images
        # Where float16 scales gradients, a fused optimiser undoes that within its step, which is too late for clipping.
        fused = self.device.type in ("cpu", "cuda") and self.trainer.precision != "16-mixed"
        optimizer = torch.optim.AdamW(self._groups(), betas=(0.9, 0.98), fused=fused or None)
        steps = int(self.trainer.estimated_stepping_batches)
        warmup = max(1, round(self.warmup * steps))

        def share(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _groups(self) -> list[dict[str, Any]]:
        """Return what learns: matrices, which decay, and the rest; the encoder's apart if it has a rate of its own."""
        embeddings = {id(module.weight) for module in self.captioner.modules() if isinstance(module, nn.Embedding)}
        own = self.captioner.encoder.parameters() if self.encoder_learning_rate is not None else ()
        apart = {id(parameter) for parameter in own}
        groups = []
        for rate, is_apart in ((self.learning_rate, False), (self.encoder_learning_rate, True)):
            learning = [p for p in self.parameters() if p.requires_grad and (id(p) in apart) is is_apart]
            decays = [p for p in learning if p.dim() > 1 and id(p) not in embeddings]
            stays = [p for p in learning if p.dim() <= 1 or id(p) in embeddings]
            groups.append({"params": decays, "lr": rate, "weight_decay": self.weight_decay})
            groups.append({"params": stays, "lr": rate, "weight_decay": 0.0})
        return [group for group in groups if group["params"]]

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Stop where a loss or a gradient is not finite, which is seen from the norm that clipping needs; then clip.

        Lightning would refuse a fused optimiser in bfloat16, although nothing is scaled there. Where float16 is scaled,
        a step whose gradients are not finite is left out and the scale made smaller: there the loss alone is watched.

        Raises
        ------
        InputError
            Where it stops.
        """
        plugin = self.trainer.precision_plugin
        scaled = isinstance(plugin, MixedPrecision) and plugin.scaler is not None
        parameters = [p for p in plugin.main_params(optimizer) if p.grad is not None]
        gradients = [p.grad for p in parameters if p.grad is not None]
        largest = gradient_clip_val or 0.0  # 0: they are not clipped
        by_value = gradient_clip_algorithm == GradClipAlgorithmType.VALUE
        norm = None
        if largest > 0 and not by_value:
            norm = nn.utils.clip_grad_norm_(parameters, largest)
        elif not scaled:
            norm = nn.utils.get_total_norm(gradients)
        self._watch.look(gradients, None if scaled else norm, when=self._when, saved=self._saved)
        if largest > 0 and by_value:
            nn.utils.clip_grad_value_(parameters, largest)

    @property
    def _when(self) -> str:
        return f"step {self.trainer.global_step + 1} (epoch {self.trainer.current_epoch + 1})"

    @property
    def _saved(self) -> str:
        callback = self.trainer.checkpoint_callback
        path = getattr(callback, "last_model_path", "") or getattr(callback, "best_model_path", "")
        return f"the last checkpoint before is {path}" if path else "no checkpoint was written before"

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put the captioner under its own key, complete and free of code.

        Raises
        ------
        InputError
            Where a weight is not finite: a step can be too large whose gradients are finite.
        """
        weights = {name: value for name, value in self.captioner.state_dict().items() if value.is_floating_point()}
        if not torch.stack([value.isfinite().all() for value in weights.values()]).all():
            wrong = next(name for name, value in weights.items() if not value.isfinite().all())
            raise InputError(
                f"The weights are not finite after step {self.trainer.global_step} ({wrong}) and were not saved; "
                f"{self._saved}: go on with a lower model.learning_rate."
            )
        # Its tensors are those of Lightning's state dict, and torch writes a tensor that stands twice once.
        checkpoint[KEY] = pack(self.captioner.contents(self.scores))
        if isinstance(self.objective, SelfCritical):
            checkpoint[REWARD] = self.reward.document_frequencies.fingerprint

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the words from the file and see that its weights fit; nothing else of it is used.

        Raises
        ------
        InputError
            Where the file's vocabulary is not that of the training captions, its weights are another model's, or it
            holds no state of the optimiser to go on from, or one that trained other parts.
        """
        contents = unpack(checkpoint, "The file of --ckpt_path")
        vocabulary = restore(contents.words, contents.vocabulary, "the file of --ckpt_path")
        if self.trainer.state.fn == TrainerFn.FITTING:
            if vocabulary != self.data.vocabulary:
                raise InputError(
                    f"The checkpoint knows {vocabulary}, but not those of these training captions: go on with the "
                    "captions, the units and the minimum_count that it was trained with."
                )
            if "optimizer_states" not in checkpoint:
                raise InputError(
                    "The checkpoint holds no state of the optimiser, so training cannot go on from it: give last.ckpt, "
                    "which stands beside it."
                )
        else:
            self._build(vocabulary)
        self.scores = dict(contents.scores)
        if wrong := _differing(self.captioner.state_dict(), contents.tensors):
            raise InputError(
                f"The checkpoint's weights are another model's ({len(wrong)} tensors differ, {min(wrong)} among them): "
                "give the configuration that it was trained with."
            )
        if self.trainer.state.fn == TrainerFn.FITTING:
            trained = [len(group["params"]) for group in checkpoint["optimizer_states"][0]["param_groups"]]
            if trained != [len(group["params"]) for group in self._groups()]:
                raise InputError(
                    "The checkpoint's optimiser has trained other parts than are to learn here: go on with the "
                    "encoder's learns, the encoder_learning_rate and the word_presence that it was trained with."
                )
            if isinstance(self.objective, SelfCritical) and REWARD in checkpoint:
                fingerprint = self.reward.document_frequencies.fingerprint
                if checkpoint[REWARD] != fingerprint:
                    raise InputError(
                        f"The checkpoint was rewarded by the document frequencies {checkpoint[REWARD]}, and those of "
                        f"these training captions are {fingerprint}: go on with the captions that it was trained with."
                    )
        self._starts = False
        # A head that serves training only may be in the file and not here, or the other way round.
        own, stored = self.state_dict(), checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: stored.get(name, tensor) for name, tensor in own.items()}


def in_words(encoder: Encoder, precision: str) -> str:
    """Return an encoder's settings for people, such as "ResNet, depth 50, stage 4, crop 224, 32-true"."""
    name = encoder.module_name if isinstance(encoder, ForeignEncoder) else type(encoder).__name__
    unsaid = ("class", "preprocessing", "learns", "recompute")
    words = [f"{key} {value}" for key, value in describe(encoder).items() if key not in unsaid and value is not None]
    if isinstance(encoder, PrecomputedRegions):
        return ", ".join([name, *words])
    return ", ".join([name, *words, f"{encoder.preprocessing.fit} {encoder.preprocessing.size}", precision])


def _differing(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the tensors that only one of two models has, or in another shape."""
    return [
        name
        for name in wanted.keys() | found.keys()
        if name not in wanted or name not in found or wanted[name].shape != found[name].shape
    ]


def _source(module: nn.Module) -> str:
    """Return the file that a foreign module is written in, if it can be had: other code gives other annotations."""
    try:
        return inspect.getsource(sys.modules[type(module).__module__])
    except (OSError, TypeError):
        return ""
