#!lua
-- DONE -> new: a finished mail gets a new life. No allow-oom: refused when memory is full.
-- KEYS 1 stream 2 index 3 open 4 set of this run 5.. n hashes of steps, one a mail, then the processed sets
-- ARGV 1 most entries in the stream 2 seconds a run is remembered 3 n,
--      then n x {email_id, member, number of its set from 1, field in open, f, f x (name or value)}
-- -> n x (OK | ALREADY: brought back by this run before, whatever became of it | LIVE: it is unfinished | DEAD: it is a dead letter |
--         UNKNOWN: never finished | FULL: no room, nothing was changed)
local n, cursor, mails = tonumber(ARGV[3]), 4, {}
for i = 1, n do
  local size = tonumber(ARGV[cursor + 4])
  if size > 2000 then return redis.error_reply('ERR a mail of more than 1,000 fields') end
  mails[i] = {id = ARGV[cursor], member = ARGV[cursor + 1], set = KEYS[4 + n + tonumber(ARGV[cursor + 2])], open = ARGV[cursor + 3],
              first = cursor + 5, last = cursor + 4 + size}
  cursor = cursor + 5 + size
end
local answer = {}
for i, mail in ipairs(mails) do
  local location = redis.call('HGET', KEYS[2], mail.id)
  if redis.call('SISMEMBER', KEYS[4], mail.id) == 1 then
    answer[i] = 'ALREADY'
  elseif location then
    answer[i] = string.sub(location, 1, 2) == 'D:' and 'DEAD' or 'LIVE'
  elseif redis.call('SISMEMBER', mail.set, mail.member) == 0 then
    answer[i] = 'UNKNOWN'
  elseif redis.call('XLEN', KEYS[1]) >= tonumber(ARGV[1]) then
    answer[i] = 'FULL'
  else
    redis.call('SREM', mail.set, mail.member)
    redis.call('HSET', KEYS[2], mail.id, 'S:' .. redis.call('XADD', KEYS[1], '*', unpack(ARGV, mail.first, mail.last)))
    redis.call('HINCRBY', KEYS[3], mail.open, 1)
    redis.call('DEL', KEYS[4 + i])
    redis.call('SADD', KEYS[4], mail.id)
    redis.call('EXPIRE', KEYS[4], ARGV[2])
    answer[i] = 'OK'
  end
end
return answer
