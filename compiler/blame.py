"""Whose line an error came from: the innermost frame that is neither torch's nor ours, as one sentence."""

from __future__ import annotations

import os
import traceback

import torch

NOT_THE_USERS = (os.path.dirname(torch.__file__) + os.sep, os.path.dirname(os.path.abspath(__file__)) + os.sep)


def blame(error: BaseException) -> str:
    """For example: ValueError: no such thing, at model.py:12 in forward"""
    reason = f"{type(error).__name__}: {first_line(error)}"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith((*NOT_THE_USERS, "<"))]
    return f"{reason}, at {os.path.basename(frames[-1].filename)}:{frames[-1].lineno} in {frames[-1].name}" if frames else reason


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]
