# SPDX-License-Identifier: Apache-2.0
"""Draft, verify, commit: `step.py` is the page to read first."""
