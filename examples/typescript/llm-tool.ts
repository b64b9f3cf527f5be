// A tool for a language model: it runs code and always has something to say about it.
import { BadRequestError, RateLimitError, Sandbox, ZerobootError } from "@zeroboot/sdk";

const sandbox = new Sandbox();

export const executeCode = {
  name: "execute_code",
  description: "Runs Python in a fresh sandbox without network and returns what it prints.",
  inputSchema: {
    type: "object",
    properties: { code: { type: "string" } },
    required: ["code"],
  },
  async execute({ code }: { code: string }, signal?: AbortSignal): Promise<string> {
    try {
      const result = await sandbox.run(code, { language: "python", timeout: 10, signal });
      if (result.ok) return result; // the output
      // Code that fails is not an exception: the model can read the traceback and mend it.
      return `${result.stdout}\n${result.stderr}\n(${result.outcome}, exit code ${result.exit_code})`;
    } catch (error) {
      if (error instanceof RateLimitError) return `Busy. Try again in ${error.retryAfter ?? 1} s.`;
      if (error instanceof BadRequestError) return `Not run: ${error.message}`;
      if (error instanceof ZerobootError) return "The sandbox is not available.";
      throw error; // aborted
    }
  },
};

console.log(await executeCode.execute({ code: "print(sum(range(10)))" }));
console.log(await executeCode.execute({ code: "1 / 0" }));
