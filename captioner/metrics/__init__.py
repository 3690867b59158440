"""BLEU, ROUGE-L and CIDEr-D, as the COCO evaluation server computes them.

`score_captions` takes captions as text; `bleu`, `rouge_l` and `cider_d` take tokens. All give COCO's units (a BLEU-4 of
0.3, not 30; a CIDEr-D of 1.0 where papers write 100), and every image counts once.
"""

from captioner.metrics.bleu import bleu
from captioner.metrics.bootstrap import Comparison, paired_bootstrap
from captioner.metrics.cider import cider_d
from captioner.metrics.rouge import rouge_l
from captioner.metrics.score import Score
from captioner.metrics.text import score_captions

__all__ = ["Comparison", "Score", "bleu", "cider_d", "paired_bootstrap", "rouge_l", "score_captions"]
