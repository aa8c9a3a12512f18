# SPDX-License-Identifier: Apache-2.0
"""Drafting and verifying side by side, on devices of their own (PEARL)."""
