"""The paper's comparisons on any model, as one resumable study and one self-contained report.

reproduce(load_study("embedded"), "study")      runs what is missing, and writes study/report.html
"""

from caa_lens.experiments.report.estimate import estimate, memory
from caa_lens.experiments.report.page import write_page
from caa_lens.experiments.report.published import published_numbers, write_published
from caa_lens.experiments.report.run import reproduce
from caa_lens.experiments.report.study import Study, load_study, presets, study_of

__all__ = [
    "Study",
    "estimate",
    "load_study",
    "memory",
    "presets",
    "published_numbers",
    "reproduce",
    "study_of",
    "write_page",
    "write_published",
]
