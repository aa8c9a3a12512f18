# SPDX-License-Identifier: Apache-2.0
"""Steps of reasoning drafted ahead by a smaller model. Not exact: see `lookahead`."""
