"""The code interpreter, by E2B's documentation of `run_code`."""

import base64
import threading

import pytest
from e2b import NotFoundException, SandboxException, TimeoutException


def test_the_value_of_the_last_line_comes_back(sandbox):
    execution = sandbox.run_code("x = 6\nx * 7")
    assert (execution.text, execution.error, execution.logs.stdout) == ("42", None, [])
    assert sandbox.run_code("x += 1; x").text == "7"
    assert sandbox.run_code("'text'").text == "text"
    assert sandbox.run_code("y = 1").results == []


def test_output_is_told_by_stream_and_as_it_comes(sandbox):
    out, err = [], []
    execution = sandbox.run_code(
        "import sys\nprint('hello ä')\nprint('bad', file=sys.stderr)",
        on_stdout=lambda message: out.append(message.line),
        on_stderr=lambda message: err.append(message.line),
    )
    assert ("".join(execution.logs.stdout), "".join(execution.logs.stderr)) == ("hello ä\n", "bad\n")
    assert ("".join(out), "".join(err)) == ("hello ä\n", "bad\n")


def test_an_error_has_its_name_value_and_traceback(sandbox):
    errors = []
    execution = sandbox.run_code("def f():\n    return 1 / 0\nf()", on_error=errors.append)
    assert (execution.error.name, execution.error.value) == ("ZeroDivisionError", "division by zero")
    assert "ZeroDivisionError" in execution.error.traceback and errors == [execution.error]
    assert execution.text is None
    assert sandbox.run_code("1").error is None


def test_executions_are_counted(sandbox):
    first = sandbox.run_code("1").execution_count
    assert sandbox.run_code("1").execution_count == first + 1


def test_what_is_displayed_has_its_formats(sandbox):
    code = """
class Shown:
    def _repr_html_(self): return '<b>x</b>'
    def _repr_markdown_(self): return '**x**'
    def _repr_latex_(self): return '$x$'
    def _repr_svg_(self): return '<svg/>'
    def _repr_png_(self): return b'\\x89PNG'
    def _repr_json_(self): return {'a': [1]}
    def _repr_javascript_(self): return 'x'
Shown()
"""
    results = []
    execution = sandbox.run_code(code, on_result=results.append)
    [result] = execution.results
    assert result.is_main_result and results == [result]
    assert (result.html, result.markdown, result.latex, result.svg) == ("<b>x</b>", "**x**", "$x$", "<svg/>")
    assert base64.b64decode(result.png) == b"\x89PNG"
    assert (result.json, result.javascript) == ({"a": [1]}, "x")


def test_variables_are_set_for_one_execution(sandbox):
    code = "import os; os.environ.get('ONLY'), os.environ.get('HOME')"
    assert sandbox.run_code(code, envs={"ONLY": "ä'\"\\\n", "HOME": "/tmp"}).text == repr(("ä'\"\\\n", "/tmp"))
    assert sandbox.run_code(code).text == repr((None, "/home/user"))
    execution = sandbox.run_code("import os; os.environ['ONLY'] + 1", envs={"ONLY": "x"})
    assert execution.error.name == "TypeError"
    assert sandbox.run_code("os.environ.get('ONLY') is None").text == "True"


def test_contexts_have_a_state_and_a_directory_of_their_own(sandbox):
    sandbox.files.make_dir("/tmp/there")
    context = sandbox.create_code_context(cwd="/tmp/there", language="python")
    assert (context.language, context.cwd) == ("python", "/tmp/there")
    sandbox.run_code("x = 1")
    sandbox.run_code("x = 2", context=context)
    assert sandbox.run_code("x").text == "1"
    assert sandbox.run_code("import os; x, os.getcwd()", context=context).text == "(2, '/tmp/there')"
    assert context.id in [one.id for one in sandbox.list_code_contexts()]
    sandbox.restart_code_context(context)
    assert sandbox.run_code("x", context=context).error.name == "NameError"
    sandbox.remove_code_context(context)
    assert context.id not in [one.id for one in sandbox.list_code_contexts()]
    with pytest.raises(NotFoundException):
        sandbox.run_code("x", context=context)


def test_other_languages_run_as_programs_or_are_refused(sandbox):
    execution = sandbox.run_code("echo $((6*7)); echo bad >&2", language="bash")
    assert (execution.logs.stdout, execution.logs.stderr, execution.error) == (["42\n"], ["bad\n"], None)
    assert sandbox.run_code("exit 3", language="bash").error.value == "exit status 3"
    assert sandbox.run_code("console.log(6*7)", language="javascript").logs.stdout == ["42\n"]
    for language in ("r", "java", "cobol"):
        with pytest.raises(SandboxException, match="interpreter|language"):
            sandbox.run_code("1", language=language)


def test_javascript_has_a_state_in_its_own_template(server):
    from e2b_code_interpreter import Sandbox

    with Sandbox.create("node") as sandbox:
        sandbox.run_code("const x = 6")
        execution = sandbox.run_code("console.log(process.env.A); x * 7", language="js", envs={"A": "b"})
        assert (execution.text, execution.logs.stdout) == ("42", ["b\n"])


def test_an_execution_that_its_client_leaves_is_interrupted(sandbox):
    sandbox.run_code("kept = 1")
    with pytest.raises(TimeoutException):
        sandbox.run_code("while True: pass", timeout=1)
    # The interpreter is free again, with its state.
    assert sandbox.run_code("kept", timeout=60).text == "1"


def test_a_context_that_ends_begins_anew(sandbox):
    sandbox.run_code("x = 1")
    assert sandbox.run_code("import os; os._exit(7)").error.name == "ContextRestarting"
    assert sandbox.run_code("'x' in globals()").text == "False"


def test_executions_of_one_context_go_one_after_the_other(sandbox):
    sandbox.run_code("order = []")
    threads = [
        threading.Thread(target=sandbox.run_code, args=(f"order.append({n}); order.append({n})",)) for n in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    order = eval(sandbox.run_code("order").text)
    assert sorted(order) == sorted(2 * list(range(6)))
    assert all(order[at] == order[at + 1] for at in range(0, 12, 2))


def test_code_and_commands_share_their_files(sandbox):
    sandbox.run_code("open('/home/user/from-code', 'w').write('text')")
    assert sandbox.commands.run("cat from-code").stdout == "text"


PLOT = """
import matplotlib.pyplot as plt
figure, axes = plt.subplots()
%s
plt.show()
"""


def chart(sandbox, code):
    execution = sandbox.run_code(PLOT % code, timeout=300)
    assert execution.error is None, execution.error
    [result] = [result for result in execution.results if result.png]
    return result.chart


def test_figures_are_told_as_data(sandbox):
    line = chart(sandbox, "axes.plot([1, 2, 3], [4, 5, 6], label='a'); axes.set(xlabel='Time (s)', title='T')")
    assert (line.type, line.title, line.x_label, line.x_unit) == ("line", "T", "Time (s)", "s")
    assert [(one.label, one.points) for one in line.elements] == [("a", [(1, 4), (2, 5), (3, 6)])]
    scatter = chart(sandbox, "axes.scatter([1, 2], [3, 4])")
    assert (scatter.type, scatter.elements[0].points) == ("scatter", [(1, 3), (2, 4)])
    bar = chart(sandbox, "axes.bar(['x', 'y'], [3, 4], label='g')")
    assert bar.type == "bar" and [(one.label, one.group, one.value) for one in bar.elements] == [("x", "g", 3), ("y", "g", 4)]
    pie = chart(sandbox, "axes.pie([1, 3], labels=['p', 'q'])")
    assert pie.type == "pie" and [(one.label, round(one.angle)) for one in pie.elements] == [("p", 90), ("q", 270)]
    box = chart(sandbox, "axes.boxplot([[1, 2, 3, 4, 100]])")
    assert (box.type, box.elements[0].median, box.elements[0].outliers) == ("box_and_whisker", 3, [100])
    both = chart(sandbox, "plt.close(figure); figure, axes = plt.subplots(1, 2); axes[0].plot([1], [2]); axes[1].bar([1], [2])")
    assert both.type == "superchart" and [one.type for one in both.elements] == ["line", "bar"]


def test_a_table_is_told_as_data(sandbox):
    code = "import pandas\npandas.DataFrame({'a': [1, 2], 'b': ['x', None], 'c': [0.5, float('nan')]})"
    execution = sandbox.run_code(code, timeout=300)
    assert execution.results[0].data == {"a": [1, 2], "b": ["x", None], "c": [0.5, None]}
    assert "<table" in execution.results[0].html
