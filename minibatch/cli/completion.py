"""``minibatch completion``: the Tab key in a shell."""

from __future__ import annotations

import os

import click
from click.shell_completion import get_completion_class

SHELLS = ('bash', 'zsh', 'fish')
VARIABLE = '_MINIBATCH_COMPLETE'


@click.command()
@click.argument('shell', type=click.Choice(SHELLS), required=False)
def completion(shell: str | None) -> None:
    """Print the script that lets SHELL (bash, zsh or fish; by default yours) complete commands, options and names.

    Streams and groups are completed from MINIBATCH_MONGO_URL, MONGO_URL, or an embedded MongoDB that runs.

    \b
    Examples:
      eval "$(minibatch completion bash)"
      minibatch completion zsh > ~/.minibatch-complete.zsh      and source it in ~/.zshrc
      minibatch completion fish > ~/.config/fish/completions/minibatch.fish
    """
    shell = shell or os.path.basename(os.environ.get('SHELL', ''))
    found = get_completion_class(shell) if shell in SHELLS else None
    if found is None:
        raise click.UsageError(f'say which shell: {", ".join(SHELLS)}')
    click.echo(found(click.Group(), {}, 'minibatch', VARIABLE).source())
