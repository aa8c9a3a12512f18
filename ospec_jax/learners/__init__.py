# SPDX-License-Identifier: Apache-2.0
"""Draft parameters as a function of feedback: pure state transitions."""
