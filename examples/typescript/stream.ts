// What happens, as it happens.
import { Sandbox } from "@zeroboot/sdk";

const code = `
import time
for n in range(3):
    print(n, flush=True)
    time.sleep(0.1)
`;

// Leaving the loop early would end the sandbox.
for await (const event of new Sandbox().stream(code, { language: "python" })) {
  switch (event.type) {
    case "start":
      console.log(`sandbox ${event.isolation}, made in ${event.fork_time_ms} ms`);
      break;
    case "stdout":
    case "stderr":
      process.stdout.write(event.text);
      break;
    case "end":
      console.log(`exit code ${event.result.exit_code}`);
  }
}
