#!lua flags=allow-oom
-- DONE: result, processed id, acknowledgement and deletion in one step, only for the owner.
-- KEYS 1 stream 2 index 3 starts 4 tries 5 results 6 open 7.. processed sets, then steps of mails
-- ARGV 1 group 2 consumer 3 seconds a processed id is kept 4 most results 5 seconds a result is kept,
--      then n x {stream id, delivery count, email_id, member, number of its set from 1, field in open, outcome, result,
--            handler, mailbox, uid, internal_date, from, raw_ref, correlation_id: what `reprocess` and `trace` need to find the mail again,
--            place of its steps in KEYS, which are kept for a day more; 0: it has none}
-- -> n x (OK | ALREADY: done before, by this call repeated or by another worker | LOST)
--#include fence
local FIRST, STEP, DAY, ids = 6, 16, 86400, {}
for i = FIRST, #ARGV, STEP do ids[#ids + 1] = ARGV[i] end
local owned = held(KEYS[1], ARGV[1], ARGV[2], ids)
local answer, sids, email_ids, members, open = {}, {}, {}, {}, {}
for i = FIRST, #ARGV, STEP do
  local sid, count, id, member, set, unfinished, outcome, result, handler, mailbox, uid, internal_date, from, raw_ref, correlation_id, steps =
    unpack(ARGV, i, i + STEP - 1)
  set, steps = tonumber(set), tonumber(steps)
  if owned[sid] ~= count then
    local done = owned[sid] == 'settled ' .. count or redis.call('SISMEMBER', KEYS[6 + set], member) == 1
    answer[#answer + 1] = done and 'ALREADY' or 'LOST'
  else
    answer[#answer + 1] = 'OK'
    owned[sid] = 'settled ' .. count              -- the same delivery may come twice: where Redis came back older it was given again
    sids[#sids + 1] = sid
    email_ids[#email_ids + 1] = id
    members[set] = members[set] or {}
    table.insert(members[set], member)
    open[unfinished] = (open[unfinished] or 0) + 1
    if steps > 0 then redis.call('EXPIRE', KEYS[steps], DAY) end
    redis.call('XADD', KEYS[5], 'MAXLEN', '~', ARGV[4], '*', 'email_id', id, 'outcome', outcome, 'result', result,
      'handler', handler, 'mailbox', mailbox, 'uid', uid, 'internal_date', internal_date, 'from', from,
      'raw_ref', raw_ref, 'correlation_id', correlation_id)
  end
end
if #sids > 0 then
  local time = redis.call('TIME')
  redis.call('XTRIM', KEYS[5], 'MINID', '~', string.format('%.0f', math.max(0, time[1] - tonumber(ARGV[5])) * 1000))
  for set, part in pairs(members) do
    redis.call('SADD', KEYS[6 + set], unpack(part))
    redis.call('EXPIRE', KEYS[6 + set], ARGV[3])
  end
  for field, count in pairs(open) do
    if redis.call('HINCRBY', KEYS[6], field, -count) <= 0 then redis.call('HDEL', KEYS[6], field) end
  end
  redis.call('HDEL', KEYS[2], unpack(email_ids))
  redis.call('HDEL', KEYS[3], unpack(email_ids))
  if redis.call('EXISTS', KEYS[4]) == 1 then redis.call('HDEL', KEYS[4], unpack(email_ids)) end
  redis.call('XACK', KEYS[1], ARGV[1], unpack(sids))
  redis.call('XDEL', KEYS[1], unpack(sids))
end
return answer
