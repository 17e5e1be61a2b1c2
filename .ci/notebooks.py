"""What is done with the notebooks besides running experiments: export, test, execute, check, README, HTML pages.

    python .ci/notebooks.py export | test | execute [words] | check | readme | docs

Development tools only (nbdev, nbconvert, nbclient); the library imports none of them.
"""
import ast
import filecmp
import html
import json
import os
import posixpath
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / 'nbs'
ROOMS = ('data', 'evaluation', 'training', 'baselines', 'dual_view', 'mail', 'hisam', 'reporting', 'experiments', 'report') # reading order
RUN_BY_PLAN = ('experiments', 'report') # executed by `make reproduce`; their outputs are in results/


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def source(cell: dict) -> str:
    return ''.join(cell['source'])


def notebooks(rooms: tuple[str, ...] = ROOMS) -> list[Path]:
    """The notebooks of the rooms, in reading order."""
    return [path for room in rooms for path in sorted((NBS / room).glob('*.ipynb'))]


def library_notebooks() -> list[Path]:
    return notebooks(tuple(room for room in ROOMS if room not in RUN_BY_PLAN))


# --- library ----------------------------------------------------------------------------------------------------------

def nbdev(function: str, folder: Path) -> None:
    """Call one of nbdev's commands in a checkout, in a process of its own (it takes its settings from the working folder)."""
    module = {'nbdev_export': 'doclinks', 'nbdev_clean': 'clean', 'nbdev_docs': 'quarto'}[function]
    subprocess.run([sys.executable, '-c', f'from nbdev.{module} import {function}; {function}()'], cwd=folder, check=True)


def export() -> None:
    nbdev('nbdev_export', ROOT)


def test() -> None:
    """Execute every library notebook, two at a time; outputs are not saved."""
    from nbdev.test import nbdev_test
    os.chdir(ROOT)
    nbdev_test(n_workers=min(2, os.cpu_count() or 1), skip_folder_re=f'^({"|".join(RUN_BY_PLAN)})$')


def execute(words: list[str]) -> None:
    """Execute library notebooks (those whose path holds one of the words, or all) and save their outputs."""
    import nbformat
    from nbclient import NotebookClient
    os.environ['JUPYTER_PREFER_ENV_PATH'] = '1'
    chosen = [path for path in library_notebooks() if not words or any(word in str(path.relative_to(NBS)) for word in words)]
    for i, path in enumerate(chosen, 1):
        print(f'[{i}/{len(chosen)}] {path.relative_to(ROOT)}', flush=True)
        notebook = nbformat.read(path, as_version=4)
        NotebookClient(notebook, timeout=1800, kernel_name='python3', extra_arguments=['--log-level=ERROR'],
                       resources={'metadata': {'path': str(path.parent)}}).execute()
        beside = path.with_name(f'.partial-{path.name}')
        nbformat.write(notebook, beside)
        os.replace(beside, path)
    nbdev('nbdev_clean', ROOT)


# --- checks -----------------------------------------------------------------------------------------------------------

def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob('*.py')}


def out_of_sync(copy: Path) -> list[str]:
    """Differences between l2rec/ and what the notebooks export."""
    for path in sorted((copy / 'l2rec').rglob('*.py')):
        if path.name != '__init__.py': path.unlink()
    nbdev('nbdev_export', copy)
    here, there = files(ROOT / 'l2rec'), files(copy / 'l2rec')
    found = [f'l2rec/{name}: no notebook exports it' for name in sorted(here - there)]
    found += [f'l2rec/{name}: exported by a notebook, but not there; run `make export`' for name in sorted(there - here)]
    return found + [f'l2rec/{name}: differs from its notebook; change the notebook, then `make export`' for name in sorted(here & there)
                    if not filecmp.cmp(ROOT / 'l2rec' / name, copy / 'l2rec' / name, shallow=False)]


def not_clean(copy: Path) -> list[str]:
    """Notebooks that nbdev_clean would change."""
    nbdev('nbdev_clean', copy)
    return [f'{path.relative_to(ROOT)}: not clean; run `nbdev_clean`' for path in sorted(NBS.rglob('*.ipynb'))
            if '.ipynb_checkpoints' not in path.parts and path.read_bytes() != (copy / path.relative_to(ROOT)).read_bytes()]


def shows_a_value(cell: dict) -> bool:
    """Whether a visible code cell surely shows something: it prints, or ends in a bare expression. (A bare call may return None.)"""
    text = source(cell)
    if cell['cell_type'] != 'code' or re.search(r'^#\|\s*(export|exports|hide|default_exp|eval:\s*false)\b', text, re.M): return False
    try: body = ast.parse(re.sub(r'^\s*[%!].*$', '', text, flags=re.M)).body
    except SyntaxError: return False
    expressions = [statement.value for statement in body if isinstance(statement, ast.Expr)]
    prints = any(isinstance(value, ast.Call) and getattr(value.func, 'id', '') in ('print', 'display') for value in expressions)
    last = body[-1].value if body and isinstance(body[-1], ast.Expr) else None
    return prints or (last is not None and not isinstance(last, ast.Call) and not text.rstrip().endswith(';'))


def without_outputs() -> list[str]:
    """Lessons that show a value but have no saved output, and saved errors."""
    found = []
    for path in library_notebooks():
        for i, cell in enumerate(read(path)['cells']):
            where = f'{path.relative_to(ROOT)}, cell {i}'
            if shows_a_value(cell) and not cell['outputs']: found.append(f'{where}: no saved output; run `make notebooks`')
            if any(output['output_type'] == 'error' for output in cell.get('outputs', [])): found.append(f'{where}: the saved output is an error')
    return found


def check() -> None:
    with tempfile.TemporaryDirectory() as top:
        copy = Path(top)
        for name in ('nbs', 'l2rec'): shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints'))
        for name in ('settings.ini', 'pyproject.toml'): shutil.copy(ROOT / name, copy)
        found = not_clean(copy) + out_of_sync(copy) + without_outputs()
    if (ROOT / 'README.md').read_text() != readme_text(): found.append('README.md: differs from nbs/index.ipynb; run `make readme`')
    if found: sys.exit('\n'.join(found))
    print(f'{len(notebooks())} notebooks: library in sync, notebooks clean, outputs present, README in sync')


# --- README -----------------------------------------------------------------------------------------------------------

def readme_text() -> str:
    """nbs/index.ipynb as Markdown; its relative links start in nbs/, those of README.md at the top."""
    from nbconvert import MarkdownExporter
    text, _ = MarkdownExporter().from_filename(str(NBS / 'index.ipynb'))
    def moved(match):
        link = match[2]
        return match[0] if re.match(r'[a-z]+:|#', link) else f'{match[1]}{posixpath.normpath(posixpath.join("nbs", link))})'
    return re.sub(r'\n{3,}', '\n\n', re.sub(r'(\]\()([^)\s]+)\)', moved, text)).strip() + '\n'


def readme() -> None:
    (ROOT / 'README.md').write_text(readme_text())


# --- HTML pages -------------------------------------------------------------------------------------------------------

PAGE = '''<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1"><title>{title} · l2rec</title>
<script async src="https://cdnjs.cloudflare.com/ajax/libs/mathjax/2.7.7/latest.js?config=TeX-AMS_CHTML-full,Safe"></script>
<script type="text/x-mathjax-config">MathJax.Hub.Config({{tex2jax: {{inlineMath: [['$', '$']], processEscapes: true}}}});</script>
<style>
body {{ margin: 0; display: flex; font: 16px/1.6 system-ui, sans-serif; color: #222; }}
nav {{ flex: 0 0 15rem; padding: 1.5rem 1rem; border-right: 1px solid #ddd; font-size: .9rem; min-height: 100vh; box-sizing: border-box; }}
nav h2 {{ font-size: .8rem; margin: 1.2em 0 .2em; color: #666; }} nav a {{ display: block; }} nav a.here {{ font-weight: 600; color: #222; }}
a {{ color: #0b57a4; text-decoration: none; }} a:hover {{ text-decoration: underline; }} a.anchor-link {{ display: none; }}
main {{ flex: 1; min-width: 0; max-width: 70rem; padding: 1.5rem 2.5rem 4rem; }}
pre {{ overflow-x: auto; font-size: .85rem; line-height: 1.45; margin: .6em 0; }}
.highlight, .jp-RenderedText pre, main > div pre {{ background: #f7f7f5; padding: .6em .8em; border-radius: 4px; }}
.highlight pre, .highlight {{ margin: 0; }} .highlight pre {{ padding: 0; }}
.jp-OutputArea-output {{ margin: .3em 0 1em 1em; overflow-x: auto; }} .jp-OutputArea-output pre {{ background: none; padding: 0; }}
.prompt, .jp-InputPrompt, .jp-OutputPrompt {{ display: none; }} img {{ max-width: 100%; }}
blockquote {{ margin: 0 0 1em; color: #555; }} table {{ border-collapse: collapse; }} td, th {{ padding: .15em .7em; border-bottom: 1px solid #ddd; text-align: left; }}
@media (max-width: 50rem) {{ body {{ display: block; }} nav {{ min-height: 0; border: 0; }} }}
{pygments}
</style></head><body><nav>{nav}</nav><main>{body}</main></body></html>
'''


def title_of(path: Path) -> str:
    heading = next((re.search(r'^# (.+)$', source(c), re.M) for c in read(path)['cells'] if c['cell_type'] == 'markdown'), None)
    return heading[1] if heading else path.stem


def navigation(pages: list[Path], here: Path) -> str:
    """Links to every page, by room, relative to the page `here`."""
    parts, room = [], None
    for path in pages:
        if path.parent != NBS and path.parent.name != room:
            room = path.parent.name
            parts.append(f'<h2>{room}</h2>')
        target = os.path.relpath(path.with_suffix('.html'), here.parent)
        parts.append(f'<a href="{target}"{" class=here" if path == here else ""}>{html.escape(title_of(path))}</a>')
    return '\n'.join(parts)


def pages_without_quarto(there: Path) -> None:
    from nbconvert import HTMLExporter
    import nbformat
    from pygments.formatters import HtmlFormatter
    pages, exporter, style = [NBS / 'index.ipynb', *notebooks()], HTMLExporter(template_name='basic'), HtmlFormatter(style='tango').get_style_defs('.highlight')
    for path in pages:
        notebook = nbformat.read(path, as_version=4)
        notebook.cells = [c for c in notebook.cells if not re.search(r'^#\|\s*(hide|default_exp)\b', c.source, re.M)]
        for cell in notebook.cells: cell.source = re.sub(r'^#\|.*\n?', '', cell.source, flags=re.M) if cell.cell_type == 'code' else cell.source
        body, _ = exporter.from_notebook_node(notebook)
        body = re.sub(r'href="(?![a-z]+:)([^"#]+)\.ipynb(#[^"]*)?"', lambda m: f'href="{m[1]}.html{m[2] or ""}"', body)
        target = there / path.relative_to(NBS).with_suffix('.html')
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(PAGE.format(title=html.escape(title_of(path)), pygments=style, nav=navigation(pages, path), body=body))


def broken_links(there: Path) -> list[str]:
    """Relative links to pages that are not there."""
    return [f'{page.relative_to(there)}: {link}' for page in sorted(there.rglob('*.html'))
            for link in re.findall(r'href="(?![a-z]+:|#)([^"#]+\.html)', page.read_text()) if not (page.parent / link).exists()]


def docs() -> None:
    if shutil.which('quarto'): return nbdev('nbdev_docs', ROOT)
    there = ROOT / '_docs'
    shutil.rmtree(there, ignore_errors=True)
    pages_without_quarto(there)
    broken = broken_links(there)
    if broken: sys.exit('links that lead nowhere:\n' + '\n'.join(broken))
    print(f'{len(list(there.rglob("*.html")))} pages; open _docs/index.html')


if __name__ == '__main__':
    command, words = (sys.argv[1:] or ['help'])[0], sys.argv[2:]
    commands = dict(export=export, test=test, check=check, readme=readme, docs=docs)
    if command == 'execute': execute(words)
    elif command in commands: commands[command]()
    else: sys.exit(__doc__)
