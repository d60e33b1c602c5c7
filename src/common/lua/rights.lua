#!lua flags=no-writes
-- Which commands may we run, on which keys? Reads only: in such a script the server refuses every write, after it has looked at the ACL.
-- ARGV 1 JSON [[command, word, …], …], `{}` for the key, then the keys to try; they are not declared, or the first forbidden one ended it
-- -> n keys x n commands x (0: allowed | 1: the command is not | 2: the key is not)
local commands, answer = cjson.decode(ARGV[1]), {}
for i = 2, #ARGV do
  for _, command in ipairs(commands) do
    local words = {}
    for j, word in ipairs(command) do words[j] = word == '{}' and ARGV[i] or word end
    local reply = redis.pcall(unpack(words))
    local text = type(reply) == 'table' and reply.err or ''
    if string.find(text, "can't run this command", 1, true) or string.find(text, 'no permissions to run', 1, true) then
      answer[#answer + 1] = 1
    elseif string.find(text, "can't access at least one of the keys", 1, true) or string.find(text, 'ermissions to access', 1, true) then
      answer[#answer + 1] = 2
    else
      answer[#answer + 1] = 0
    end
  end
end
return answer
