// Says whether IAM allows requests: `node judge.mjs FOLDER` reads a question a line from its
// standard input, and writes an answer a line, both JSON. FOLDER/node_modules has
// @cloud-copilot/iam-simulate. lab.judge starts this program, and has the questions' members.
import { createRequire } from "node:module";
import { createInterface } from "node:readline";

const { runSimulation } = createRequire(`${process.argv[2]}/`)("@cloud-copilot/iam-simulate");

for await (const line of createInterface({ input: process.stdin })) {
    const question = JSON.parse(line);
    const simulation = {
        request: {
            principal: question.principal,
            action: question.action,
            resource: { resource: question.resource, accountId: question.account },
            contextVariables: question.context,
        },
        identityPolicies: [{ name: "policy", policy: question.policy }],
        serviceControlPolicies: [],
        resourceControlPolicies: [],
    };
    const { overallResult, errors } = await runSimulation(simulation, {});
    console.log(JSON.stringify({ verdict: overallResult, errors }));
}
