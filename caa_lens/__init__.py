"""Contrastive activation addition for TransformerLens.

import caa_lens as caa

model = caa.load_model("smollm2-135m-instruct")
train, held_out = caa.load_pairs("formality").split(held_out=30, seed=0)
vectors = caa.extract(model, train)
with caa.steer(model, vectors[14]):
    print(caa.generate(model, "How was your weekend?"))
"""

from caa_lens.activations import load_activations
from caa_lens.baking import bake, export_checkpoint
from caa_lens.choices import as_free_text, restyle
from caa_lens.directions import ablate, add, clamp, gate
from caa_lens.errors import CaaLensError, CaaLensWarning, EndpointError, InputError, MissingError
from caa_lens.experiments.answer_set import AnswerSet, known_answers
from caa_lens.experiments.answers import answers
from caa_lens.experiments.baselines import AdditivityResult, additivity, few_shot, prompting
from caa_lens.experiments.capability import capability, text_loss
from caa_lens.experiments.capability_result import CapabilityResult
from caa_lens.experiments.controls import learning_curve
from caa_lens.experiments.finetuning import finetune
from caa_lens.experiments.generalisation import TransferResult, transfer
from caa_lens.experiments.judge import judge, judge_from
from caa_lens.experiments.judged import JudgeResult
from caa_lens.experiments.judges.endpoint import OpenAIJudge
from caa_lens.experiments.judges.local import LocalJudge
from caa_lens.experiments.result import SweepResult
from caa_lens.experiments.rubric import Rubric
from caa_lens.experiments.sweep import score, sweep
from caa_lens.experiments.tuned import FinetuneResult
from caa_lens.extraction import extract
from caa_lens.formats import load_vectors
from caa_lens.geometry import norms, pca, similarity
from caa_lens.hooks import steering_hooks
from caa_lens.logits import logit_attribution, logit_lens
from caa_lens.models import load_model
from caa_lens.pairs import ContrastPair, PairSet
from caa_lens.patching import PatchResult, patch
from caa_lens.projected import Projection
from caa_lens.projection import project
from caa_lens.prompts import Template
from caa_lens.provenance import Provenance
from caa_lens.separation import separability
from caa_lens.sources import behaviours, load_pairs
from caa_lens.steering import generate, show_positions, steer
from caa_lens.templates import ChatTemplate, Llama2Base, Llama2Chat, Plain
from caa_lens.vector import SteeringVector
from caa_lens.vector_set import VectorSet, normalize_across

__version__ = "0.1.0"

__all__ = [
    "load_model",
    "load_pairs",
    "behaviours",
    "ContrastPair",
    "PairSet",
    "extract",
    "load_activations",
    "SteeringVector",
    "VectorSet",
    "Provenance",
    "normalize_across",
    "load_vectors",
    "steer",
    "steering_hooks",
    "generate",
    "show_positions",
    "bake",
    "export_checkpoint",
    "project",
    "Projection",
    "score",
    "sweep",
    "SweepResult",
    "few_shot",
    "prompting",
    "additivity",
    "AdditivityResult",
    "restyle",
    "as_free_text",
    "transfer",
    "TransferResult",
    "capability",
    "text_loss",
    "CapabilityResult",
    "learning_curve",
    "answers",
    "AnswerSet",
    "known_answers",
    "judge",
    "judge_from",
    "Rubric",
    "OpenAIJudge",
    "LocalJudge",
    "JudgeResult",
    "finetune",
    "FinetuneResult",
    "patch",
    "PatchResult",
    "logit_attribution",
    "logit_lens",
    "similarity",
    "pca",
    "separability",
    "norms",
    "add",
    "ablate",
    "clamp",
    "gate",
    "Template",
    "Llama2Chat",
    "Llama2Base",
    "ChatTemplate",
    "Plain",
    "CaaLensError",
    "InputError",
    "MissingError",
    "EndpointError",
    "CaaLensWarning",
]
