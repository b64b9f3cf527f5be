// A session: state between steps, an error that is looked at, a command that is followed, files.
import { Sandbox } from "@zeroboot/sdk";

await using sb = await Sandbox.create({ language: "python", timeout: 300 });
await sb.run("orders = [3, 4, 5]");
const failed = await sb.run("sum(order.amount for order in orders)");
console.log("first try:", failed.error?.name, failed.error?.value);
console.log("second try:", (await sb.run("sum(orders)")).check().value);

const command = await sb.commands.start("for step in fetch build test; do echo $step; sleep 0.1; done");
for await (const event of command.output()) {
  if (event.type === "stdout") console.log("heard:", event.text.trim());
}
await sb.files.write("notes/today.txt", "kept with the sandbox");
console.log(await sb.files.readText("notes/today.txt"));
