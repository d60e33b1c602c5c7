#!lua flags=allow-oom
-- DONE: result, processed id, acknowledgement and deletion in one step, only for the owner.
-- KEYS 1 stream 2 index 3 starts 4 tries 5 results 6 open 7.. processed sets, then steps of mails
-- ARGV 1 group 2 consumer 3 seconds a processed id is kept 4 most results 5 seconds a result is kept,
--      then n x {stream id, delivery count, email_id, member, number of its set from 1, field in open, outcome, result,
--            handler, mailbox, uid, internal_date, from, raw_ref, correlation_id: what `reprocess` and `trace` need to find the mail again,
--            place of its steps in KEYS, which are kept for a day more; 0: it has none}
-- -> n x (OK | ALREADY: done before, by this call repeated or by another worker | LOST)
--#include fence
local STEP, mails, ids = 16, {}, {}
local DAY = 86400
for i = 6, #ARGV, STEP do
  local mail = {sid = ARGV[i], count = ARGV[i + 1], id = ARGV[i + 2], member = ARGV[i + 3], set = tonumber(ARGV[i + 4]), open = ARGV[i + 5],
                rest = i + 6, steps = tonumber(ARGV[i + 15])}
  mails[#mails + 1] = mail
  ids[#ids + 1] = mail.sid
end
local owned = held(KEYS[1], ARGV[1], ARGV[2], ids)
local answer, sids, email_ids, members, open = {}, {}, {}, {}, {}
for i, mail in ipairs(mails) do
  if owned[mail.sid] ~= mail.count then
    answer[i] = redis.call('SISMEMBER', KEYS[6 + mail.set], mail.member) == 1 and 'ALREADY' or 'LOST'
  else
    answer[i] = 'OK'
    sids[#sids + 1] = mail.sid
    email_ids[#email_ids + 1] = mail.id
    members[mail.set] = members[mail.set] or {}
    table.insert(members[mail.set], mail.member)
    open[mail.open] = (open[mail.open] or 0) + 1
    local outcome, result, handler, mailbox, uid, internal_date, from, raw_ref, correlation_id = unpack(ARGV, mail.rest, mail.rest + 8)
    if mail.steps > 0 then redis.call('EXPIRE', KEYS[mail.steps], DAY) end
    redis.call('XADD', KEYS[5], 'MAXLEN', '~', ARGV[4], '*', 'email_id', mail.id, 'outcome', outcome, 'result', result,
      'handler', handler, 'mailbox', mailbox, 'uid', uid, 'internal_date', internal_date, 'from', from,
      'raw_ref', raw_ref, 'correlation_id', correlation_id)
  end
end
if #sids > 0 then
  local time = redis.call('TIME')
  redis.call('XTRIM', KEYS[5], 'MINID', '~', string.format('%.0f', (time[1] - tonumber(ARGV[5])) * 1000))
  for set, part in pairs(members) do
    redis.call('SADD', KEYS[6 + set], unpack(part))
    redis.call('EXPIRE', KEYS[6 + set], ARGV[3])
  end
  for field, count in pairs(open) do
    if redis.call('HINCRBY', KEYS[6], field, -count) <= 0 then redis.call('HDEL', KEYS[6], field) end
  end
  redis.call('HDEL', KEYS[2], unpack(email_ids))
  redis.call('HDEL', KEYS[3], unpack(email_ids))
  redis.call('HDEL', KEYS[4], unpack(email_ids))
  redis.call('XACK', KEYS[1], ARGV[1], unpack(sids))
  redis.call('XDEL', KEYS[1], unpack(sids))
end
return answer
