# SPDX-License-Identifier: Apache-2.0
"""What a run tells people while it lasts, and of itself afterwards."""
