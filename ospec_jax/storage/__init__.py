# SPDX-License-Identifier: Apache-2.0
"""Drafts and learners on disk."""
