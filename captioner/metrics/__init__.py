"""BLEU, ROUGE-L and CIDEr-D, as the COCO evaluation server computes them.

`score_captions` takes captions as text; `bleu`, `rouge_l`, `cider_d` and `score_tokens` take the tokens that
`ptb_tokenize` gives. All give COCO's units (a BLEU-4 of 0.3, not 30; a CIDEr-D of 1.0 where papers write 100), and
every image counts once. `bootstrap` says how sure a score is, `diversity` what it hides.
"""

from captioner.metrics.bleu import bleu
from captioner.metrics.bootstrap import Comparison, Interval, bootstrap, interval, paired_bootstrap, resample
from captioner.metrics.cider import CIDErD, DocumentFrequencies, cider_d
from captioner.metrics.diversity import Diversity, diversity
from captioner.metrics.meteor import find_meteor, meteor
from captioner.metrics.rouge import rouge_l
from captioner.metrics.score import Score
from captioner.metrics.text import score_captions, score_tokens
from captioner.penn_treebank import ptb_tokenize

__all__ = [
    "CIDErD",
    "Comparison",
    "Diversity",
    "DocumentFrequencies",
    "Interval",
    "Score",
    "bleu",
    "bootstrap",
    "cider_d",
    "diversity",
    "find_meteor",
    "interval",
    "meteor",
    "paired_bootstrap",
    "ptb_tokenize",
    "resample",
    "rouge_l",
    "score_captions",
    "score_tokens",
]
