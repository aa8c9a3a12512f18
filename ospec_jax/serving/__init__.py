# SPDX-License-Identifier: Apache-2.0
"""A server that learns while it serves: OpenAI's API over one live batch."""
