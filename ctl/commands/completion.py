"""cellvisor completion."""

from __future__ import annotations

import argparse

from cellvisor.ctl import common

HELP = "Print what makes a shell complete verbs, flags, VMs and devices."
EXAMPLE = 'cellvisor completion bash >> ~/.bashrc; or at once: eval "$(cellvisor completion bash)"'

BASH = r"""_cellvisor() {
    local IFS=$'\n'
    COMPREPLY=($(cellvisor completion words -- "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null))
}
complete -o bashdefault -o default -F _cellvisor cellvisor
"""
ZSH = r"""#compdef cellvisor
_cellvisor() {
    local -a found
    found=("${(@f)$(cellvisor completion words -- "${(@)words[2,CURRENT]}" 2>/dev/null)}")
    if [[ -n "$found[1]" ]]; then compadd -- "${found[@]}"; else _files; fi
}
if [[ "$funcstack[1]" == _cellvisor ]]; then _cellvisor "$@"; else compdef _cellvisor cellvisor; fi
"""
FISH = r"""function __cellvisor_complete
    set -l before (commandline -opc)
    set -e before[1]
    set -l now (commandline -ct)
    set -l found (cellvisor completion words -- $before "$now" 2>/dev/null)
    if test -n "$found"
        printf '%s\n' $found
    else
        __fish_complete_path "$now"
    end
end
complete -c cellvisor -f -a '(__cellvisor_complete)'
"""
SCRIPTS = {"bash": BASH, "zsh": ZSH, "fish": FISH}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add SHELL and --json; `words -- WORD...` is what the scripts ask."""
    parser.usage = "%(prog)s bash|zsh|fish [--json]"
    parser.add_argument("shell", choices=(*SCRIPTS, "words"), metavar="bash|zsh|fish")
    parser.add_argument("line", nargs="*", default=[], help=argparse.SUPPRESS)
    common.add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Print the script, or the words that the command line may go on with."""
    from cellvisor.core.errors import UsageError

    if options.shell == "words":
        from cellvisor.ctl.complete import complete

        found = complete(options.line)
        if options.json:
            return common.show_json(found)
        print("".join(f"{word}\n" for word in found), end="")
        return 0
    if options.line:
        raise UsageError(f"unexpected argument {options.line[0][:80]!r}", hint="see cellvisor completion --help")
    script = SCRIPTS[options.shell]
    if options.json:
        return common.show_json({"shell": options.shell, "script": script})
    print(script, end="")
    return 0
