#!lua flags=allow-oom
-- Remove consumers that hold nothing. With a pending entry XGROUP DELCONSUMER would lose it.
-- KEYS 1 stream   ARGV 1 group 2 least idle time in ms 3 only this consumer ('': any)   -> how many
local n = 0
if redis.call('EXISTS', KEYS[1]) == 0 then return n end   -- flushed: XINFO would end in an error
for _, row in ipairs(redis.call('XINFO', 'CONSUMERS', KEYS[1], ARGV[1])) do
  local consumer = {}
  for i = 1, #row, 2 do consumer[row[i]] = row[i + 1] end
  if consumer.pending == 0 and consumer.idle >= tonumber(ARGV[2]) and (ARGV[3] == '' or ARGV[3] == consumer.name) then
    redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], consumer.name)
    n = n + 1
  end
end
return n
