# SPDX-License-Identifier: Apache-2.0
"""Prompts and tokenizers."""
