# A sandbox from the command line: state, a command, files.
ID=$(zeroboot sandbox create --template python --timeout 5m)
trap 'zeroboot sandbox rm "$ID"' EXIT

zeroboot sandbox run "$ID" -c 'squares = [n * n for n in range(5)]'
zeroboot sandbox run "$ID" -c 'sum(squares)'  # "30"
printf 'a,b\n1,2\n' | zeroboot sandbox cp - "$ID":data.csv
zeroboot sandbox exec "$ID" -- wc -l data.csv
zeroboot sandbox run "$ID" -c 'open("report.txt", "w").write(str(squares)); None'
zeroboot sandbox cp "$ID":report.txt .
cat report.txt
